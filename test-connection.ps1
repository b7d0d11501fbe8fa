<#
.SYNOPSIS
Checks a deployed WebSocket gateway from the outside and from the inside.

.DESCRIPTION
Runs up to five checks against the stack that deploy-ecs.ps1 made:

  Health     GET /health answers 200 and "ok"
  Service    ECS runs as many tasks as it should, and no rollout is under way
  Targets    the load balancer finds every task healthy
  Logs       the service wrote log lines in the last minutes
  WebSocket  connect, greeting, ping and pong

Every check gives one object with the properties Check, Passed, Detail and NextStep. Each is shown in
one line, or returned with -PassThru. The exit code is 0 when all passed and 1 otherwise.
Nothing is changed. Needs the AWS CLI (version 1 or 2), signed in.

.EXAMPLE
./test-connection.ps1

Checks the production stack in us-east-1.

.EXAMPLE
./test-connection.ps1 -StackName agenticai-websocket-staging -AwsRegion eu-west-1 -WaitSeconds 120

Checks another stack, and gives it two minutes to become ready.

.EXAMPLE
./test-connection.ps1 -Check 'Health', 'WebSocket' -PassThru | Where-Object { -not $_.Passed }

Returns only what failed, for another script.
#>
[CmdletBinding()]
param(
    # The gateway's CloudFormation stack.
    [ValidatePattern('^[A-Za-z][A-Za-z0-9-]{0,127}$')]
    [string]$StackName = 'agenticai-websocket-stack',
    # The region the stack is in.
    [ValidatePattern('(?-i)^[a-z]{2}(-[a-z]+)+-\d$')]
    [string]$AwsRegion = 'us-east-1',
    # Profile of the AWS CLI to use, also where there are keys in the environment.
    [ValidateNotNullOrEmpty()]
    [string]$AwsProfile,
    # Which checks to run; all of them unless told.
    [ValidateSet('Health', 'Service', 'Targets', 'Logs', 'WebSocket')]
    [string[]]$Check = @('Health', 'Service', 'Targets', 'Logs', 'WebSocket'),
    # Address to test instead of the stack's own WebSocketEndpoint, such as wss://ws.example.com.
    [ValidatePattern('^wss?://[^/\s]+(/\S*)?$')]
    [string]$Endpoint,
    # Token to connect with; $env:AGENTICAI_TOKEN unless given.
    [string]$AccessToken = $env:AGENTICAI_TOKEN,
    # Origin header to connect with. The default is the first of the origins the stack allows.
    [string]$Origin,
    # How far back to look for log lines.
    [ValidateRange(1, 1440)]
    [int]$LogMinutes = 10,
    # How long one request or one answer may take.
    [ValidateRange(1, 300)]
    [int]$TimeoutSeconds = 10,
    # How long to repeat checks that fail before giving up. 0 tries each once.
    [ValidateRange(0, 3600)]
    [int]$WaitSeconds = 0,
    # Return the result objects instead of showing lines.
    [switch]$PassThru
)

. (Join-Path -Path $PSScriptRoot -ChildPath 'ecs-common.ps1')

# --- Checks ---------------------------------------------------------------------------------------

function ConvertTo-CheckResult {
    [CmdletBinding()] param([string]$Check, [bool]$Passed, [string]$Detail, [string]$NextStep)
    if ($Passed) {
        $NextStep = ''
    }
    [pscustomobject]@{ Check = $Check; Passed = $Passed; Detail = $Detail; NextStep = $NextStep }
}

function Test-Health {
    [CmdletBinding()] param([uri]$Address)
    # The progress bar makes Windows PowerShell's web requests many times slower.
    $ProgressPreference = 'SilentlyContinue'
    $scheme = 'http'
    if ($Address.Scheme -eq 'wss') {
        $scheme = 'https'
    }
    $uri = '{0}://{1}/health' -f $scheme, $Address.Authority
    $passed = $false
    try {
        $answer = Invoke-WebRequest -Uri $uri -UseBasicParsing -TimeoutSec $TimeoutSeconds
        $content = ([string]$answer.Content).Trim()
        $passed = $answer.StatusCode -eq 200 -and $content -match '"status"\s*:\s*"ok"'
        $detail = "$uri answered $($answer.StatusCode) $content"
    }
    catch {
        # The details are what the server answered, or the message once more.
        $said = $_.Exception.GetBaseException().Message, [string]$_.ErrorDetails | Select-Object -Unique
        $detail = "$($uri): $($said -join ' ')".Trim()
    }
    $nextStep = 'If the Targets check passes, look at DNS, the certificate and AllowedCidr; otherwise at the logs.'
    ConvertTo-CheckResult -Check 'Health' -Passed $passed -Detail $detail -NextStep $nextStep
}

function Test-EcsService {
    [CmdletBinding()] param([string]$ClusterName, [string]$ServiceName)
    $state = Get-ServiceState -ClusterName $ClusterName -ServiceName $ServiceName
    if (-not $state) {
        $nextStep = 'Run deploy-ecs.ps1 to build the image and start the service.'
        return ConvertTo-CheckResult -Check 'Service' -Passed $false -Detail 'There is no service yet.' -NextStep $nextStep
    }
    $nextStep = "See what ECS says: aws ecs describe-services --cluster $ClusterName --services $ServiceName --region $AwsRegion"
    ConvertTo-CheckResult -Check 'Service' -Passed $state.Stable -Detail $state.Text -NextStep $nextStep
}

function Test-Target {
    [CmdletBinding()] param([string]$TargetGroupArn)
    $query = 'TargetHealthDescriptions[].{Id:Target.Id,State:TargetHealth.State,Why:TargetHealth.Description}'
    $all = Invoke-AwsCli -ArgumentList 'elbv2', 'describe-target-health', '--target-group-arn', $TargetGroupArn, '--query', $query
    # A draining target belongs to a task that is on its way out, as it should be.
    $targets = @($all | Where-Object { $_.State -ne 'draining' })
    $unhealthy = @($targets | Where-Object { $_.State -ne 'healthy' })
    $detail = "$($targets.Count - $unhealthy.Count) of $($targets.Count) targets healthy"
    foreach ($target in $unhealthy) {
        $detail += "; $($target.Id) is $($target.State) ($($target.Why))"
    }
    $passed = $targets.Count -gt 0 -and $unhealthy.Count -eq 0
    $nextStep = 'A new task needs up to a minute. After that the Logs say why /health is not ok.'
    ConvertTo-CheckResult -Check 'Targets' -Passed $passed -Detail $detail -NextStep $nextStep
}

function Test-Log {
    [CmdletBinding()] param([string]$LogGroupName)
    $start = [DateTimeOffset]::UtcNow.AddMinutes(-$LogMinutes).ToUnixTimeMilliseconds()
    $arguments = 'logs', 'filter-log-events', '--log-group-name', $LogGroupName, '--start-time', "$start", '--max-items', '200', '--query', 'events[].message'
    $lines = @(Invoke-AwsCli -ArgumentList $arguments)
    $errors = @($lines | Where-Object { $_ -match '"level"\s*:\s*"ERROR"' })
    $detail = "$($lines.Count) lines in the last $LogMinutes minutes, $($errors.Count) of them errors"
    if ($lines.Count -ge 200) {
        $detail = "at least $detail"
    }
    # The service writes its metrics every minute, so silence means that it does not run.
    $nextStep = "Look at the log group $LogGroupName and at the Service check."
    ConvertTo-CheckResult -Check 'Logs' -Passed ($lines.Count -gt 0) -Detail $detail -NextStep $nextStep
}

# Returns the next whole message; throws when the server closes, with its code and reason.
function Receive-WebSocketText {
    [CmdletBinding()] param([object]$Socket, [System.Threading.CancellationToken]$CancellationToken)
    $buffer = [byte[]]::new(65536)
    $segment = [System.ArraySegment[byte]]::new($buffer)
    $message = [System.IO.MemoryStream]::new()
    do {
        $received = $Socket.ReceiveAsync($segment, $CancellationToken).GetAwaiter().GetResult()
        if ($received.MessageType -eq [System.Net.WebSockets.WebSocketMessageType]::Close) {
            throw "The server closed the connection: $([int]$received.CloseStatus) $($received.CloseStatusDescription)"
        }
        $message.Write($buffer, 0, $received.Count)
    } until ($received.EndOfMessage)
    [System.Text.Encoding]::UTF8.GetString($message.ToArray())
}

# Connects, reads the greeting, sends a ping and waits for the pong. Returns the milliseconds between
# the two; throws when anything else happens or the time is over.
function Invoke-WebSocketRoundTrip {
    [CmdletBinding()] param([uri]$Address, [string]$RequestOrigin)
    $socket = [System.Net.WebSockets.ClientWebSocket]::new()
    $timer = [System.Threading.CancellationTokenSource]::new($TimeoutSeconds * 1000)
    try {
        if ($AccessToken) {
            $socket.Options.SetRequestHeader('Authorization', "Bearer $AccessToken")
        }
        if ($RequestOrigin) {
            $socket.Options.SetRequestHeader('Origin', $RequestOrigin)
        }
        # Assigned, because PowerShell would return the empty result of a task as an object.
        $null = $socket.ConnectAsync($Address, $timer.Token).GetAwaiter().GetResult()
        $greeting = ConvertFrom-Json -InputObject (Receive-WebSocketText -Socket $socket -CancellationToken $timer.Token)
        if ($greeting.type -ne 'connected') {
            throw "The first message was '$($greeting.type)' instead of 'connected'."
        }
        $watch = [System.Diagnostics.Stopwatch]::StartNew()
        $ping = [System.ArraySegment[byte]]::new([System.Text.Encoding]::UTF8.GetBytes('{"action":"ping"}'))
        $kind = [System.Net.WebSockets.WebSocketMessageType]::Text
        $null = $socket.SendAsync($ping, $kind, $true, $timer.Token).GetAwaiter().GetResult()
        do {
            $answer = ConvertFrom-Json -InputObject (Receive-WebSocketText -Socket $socket -CancellationToken $timer.Token)
        } until ($answer.type -eq 'pong')
        $watch.Stop()
        $normal = [System.Net.WebSockets.WebSocketCloseStatus]::NormalClosure
        $null = $socket.CloseAsync($normal, 'done', $timer.Token).GetAwaiter().GetResult()
        [math]::Round($watch.Elapsed.TotalMilliseconds, 1)
    }
    catch {
        if ($timer.IsCancellationRequested) {
            throw "No answer within $TimeoutSeconds seconds."
        }
        throw
    }
    finally {
        $socket.Dispose()
        $timer.Dispose()
    }
}

function Test-WebSocket {
    [CmdletBinding()] param([uri]$Address, [string]$RequestOrigin, [bool]$AuthenticationOn)
    try {
        $milliseconds = Invoke-WebSocketRoundTrip -Address $Address -RequestOrigin $RequestOrigin
    }
    catch {
        $problem = $_.Exception.GetBaseException().Message
        # 401 before the upgrade, or close code 4401 after it.
        if ($AuthenticationOn -and -not $AccessToken -and $problem -match '401') {
            $detail = 'Refused for want of a token, as configured. -AccessToken tests the whole round trip.'
            return ConvertTo-CheckResult -Check 'WebSocket' -Passed $true -Detail $detail
        }
        $nextStep = 'For 401 or 4401 give a valid -AccessToken, for 403 an allowed -Origin; otherwise look at the Health check.'
        return ConvertTo-CheckResult -Check 'WebSocket' -Passed $false -Detail "$($Address): $problem" -NextStep $nextStep
    }
    ConvertTo-CheckResult -Check 'WebSocket' -Passed $true -Detail "$Address greeted and answered a ping in $milliseconds ms"
}

# --- All of them ----------------------------------------------------------------------------------

# Returns what the checks need to know about the stack, as a hashtable.
function Get-CheckTarget {
    [CmdletBinding()] param()
    $stack = Get-Stack -Name $StackName
    if (-not $stack) {
        throw "The stack '$StackName' does not exist in this account and region. Run deploy-ecs.ps1, or name the stack and region with -StackName and -AwsRegion."
    }
    $outputs = $stack.Output
    $parameters = $stack.Parameter
    $missing = @('WebSocketEndpoint', 'ECSClusterName', 'TargetGroupArn' | Where-Object { -not $outputs[$_] })
    if ($missing.Count -gt 0) {
        throw "The stack '$StackName' ($($stack.Status)) lacks these outputs: $($missing -join ', '). Run deploy-ecs.ps1 to bring it into order."
    }
    $address = $Endpoint
    if (-not $address) {
        $address = $outputs['WebSocketEndpoint']
    }
    $requestOrigin = $Origin
    if (-not $requestOrigin) {
        $requestOrigin = ([string]$parameters['AllowedOrigins'] -split ',')[0].Trim()
    }
    $service = "agenticai-websocket-$($parameters['Environment'])"
    @{
        Address          = $address
        RequestOrigin    = $requestOrigin
        ClusterName      = $outputs['ECSClusterName']
        ServiceName      = $service
        TargetGroupArn   = $outputs['TargetGroupArn']
        LogGroupName     = "/ecs/$service"
        AuthenticationOn = [bool]$parameters['AuthJwksUrl']
    }
}

# Runs one check; an error on the way becomes a failed result.
function Invoke-Check {
    [CmdletBinding()] param([string]$Name, [hashtable]$Target)
    try {
        switch ($Name) {
            'Health' { Test-Health -Address $Target['Address'] }
            'Service' { Test-EcsService -ClusterName $Target['ClusterName'] -ServiceName $Target['ServiceName'] }
            'Targets' { Test-Target -TargetGroupArn $Target['TargetGroupArn'] }
            'Logs' { Test-Log -LogGroupName $Target['LogGroupName'] }
            'WebSocket' { Test-WebSocket -Address $Target['Address'] -RequestOrigin $Target['RequestOrigin'] -AuthenticationOn $Target['AuthenticationOn'] }
        }
    }
    catch {
        $nextStep = 'Look up what AWS said; the caller may lack the permission.'
        ConvertTo-CheckResult -Check $Name -Passed $false -Detail $_.Exception.Message -NextStep $nextStep
    }
}

# Runs the checks in order, repeating what fails until WaitSeconds are over; returns the results.
function Invoke-ConnectionTest {
    [CmdletBinding()] param()
    Assert-Tool -Advice @{ aws = 'Install the AWS CLI, version 2, and open a new terminal.' }
    # Windows PowerShell on older systems offers nothing newer than TLS 1.0 by itself.
    $protocols = [System.Net.ServicePointManager]::SecurityProtocol
    [System.Net.ServicePointManager]::SecurityProtocol = $protocols -bor [System.Net.SecurityProtocolType]::Tls12
    $target = Get-CheckTarget
    $deadline = [datetime]::UtcNow.AddSeconds($WaitSeconds)
    foreach ($name in $Check) {
        $result = Invoke-Check -Name $name -Target $target
        $shown = ''
        while (-not $result.Passed -and [datetime]::UtcNow -lt $deadline) {
            if ($result.Detail -ne $shown) {
                $shown = $result.Detail
                Write-Step -Message "  $($name): not yet ($shown)"
            }
            Start-Sleep -Seconds 5
            $result = Invoke-Check -Name $name -Target $target
        }
        $result
    }
}

function Show-CheckResult {
    [CmdletBinding()] param([object]$Result)
    $verdict = 'ok  '
    if (-not $Result.Passed) {
        $verdict = 'FAIL'
    }
    Write-Step -Message ('  {0}  {1,-9}  {2}' -f $verdict, $Result.Check, ($Result.Detail -replace '\s+', ' '))
    if ($Result.NextStep) {
        Write-Step -Message "        next: $($Result.NextStep)"
    }
}

# Dot-sourced, as the tests do it, the script only defines its functions.
if ($MyInvocation.InvocationName -ne '.') {
    $previous = Set-ProcessEnvironment -Value (Get-AwsEnvironment)
    try {
        $results = @(Invoke-ConnectionTest)
    }
    catch {
        $Host.UI.WriteErrorLine("test-connection: $($_.Exception.Message)")
        Write-Verbose -Message $_.ScriptStackTrace
        exit 1
    }
    finally {
        $null = Set-ProcessEnvironment -Value $previous
    }
    if ($PassThru) {
        $results
    }
    else {
        foreach ($one in $results) {
            Show-CheckResult -Result $one
        }
    }
    if (@($results | Where-Object { -not $_.Passed }).Count -gt 0) {
        exit 1
    }
    exit 0
}
