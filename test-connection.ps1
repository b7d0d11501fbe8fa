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

Every check gives one object with the properties Check, Passed, Detail and NextStep. They are shown
as a table, or returned with -PassThru. The exit code is 0 when all passed and 1 otherwise.
Nothing is changed. Needs the AWS CLI (version 1 or 2), signed in.

.PARAMETER StackName
The gateway's CloudFormation stack.

.PARAMETER AwsRegion
The region the stack is in.

.PARAMETER AwsProfile
Profile of the AWS CLI to use instead of the default one.

.PARAMETER Check
Which checks to run; all of them unless told.

.PARAMETER Endpoint
Address to test instead of the stack's own WebSocketEndpoint, such as wss://ws.example.com.

.PARAMETER AccessToken
Token to connect with where the gateway asks for one. The default is $env:AGENTICAI_TOKEN.

.PARAMETER Origin
Origin header to connect with. The default is the first of the origins the stack allows.

.PARAMETER LogMinutes
How far back to look for log lines.

.PARAMETER TimeoutSeconds
How long one request or one answer may take.

.PARAMETER WaitSeconds
How long to repeat checks that fail before giving up. 0 tries each once.

.PARAMETER PassThru
Return the result objects instead of showing a table.

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
    [ValidatePattern('^[A-Za-z][A-Za-z0-9-]{0,127}$')]
    [string]$StackName = 'agenticai-websocket-stack',

    [ValidatePattern('(?-i)^[a-z]{2}(-[a-z]+)+-\d$')]
    [string]$AwsRegion = 'us-east-1',

    [ValidateNotNullOrEmpty()]
    [string]$AwsProfile,

    [ValidateSet('Health', 'Service', 'Targets', 'Logs', 'WebSocket')]
    [string[]]$Check = @('Health', 'Service', 'Targets', 'Logs', 'WebSocket'),

    [ValidatePattern('^wss?://[^/\s]+(/\S*)?$')]
    [string]$Endpoint,

    [string]$AccessToken = $env:AGENTICAI_TOKEN,

    [string]$Origin,

    [ValidateRange(1, 1440)]
    [int]$LogMinutes = 10,

    [ValidateRange(1, 300)]
    [int]$TimeoutSeconds = 10,

    [ValidateRange(0, 3600)]
    [int]$WaitSeconds = 0,

    [switch]$PassThru
)

$ErrorActionPreference = 'Stop'

# --- Programs and environment: the same text as in deploy-ecs.ps1 ---------------------------------

function Write-Step {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [AllowEmptyString()]
        [string]$Message
    )
    Write-Information -MessageData $Message -InformationAction Continue
}

function ConvertTo-NativeLine {
    <#
    .SYNOPSIS
    Turns what a program wrote into objects with Text and IsError, and shows it on the way if told.
    #>
    [CmdletBinding()]
    param(
        [Parameter(ValueFromPipeline = $true)]
        [AllowNull()]
        [object]$InputObject,

        [switch]$Show
    )
    process {
        $isError = $InputObject -is [System.Management.Automation.ErrorRecord]
        if ($isError) {
            $text = $InputObject.Exception.Message
        }
        else {
            $text = [string]$InputObject
        }
        if ($Show) {
            Write-Step -Message "    $text"
        }
        [pscustomobject]@{ Text = $text; IsError = $isError }
    }
}

function Invoke-Native {
    <#
    .SYNOPSIS
    Runs a program. Returns ExitCode, Output and ErrorOutput (lines); a failure does not throw.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$Command,

        [Parameter(Mandatory = $true)]
        [string[]]$ArgumentList,

        [string]$InputText,

        [switch]$Show
    )
    # Windows PowerShell makes an error record of every redirected stderr line, and 'Stop' would end
    # the script at the first one: a progress line of docker, a warning of aws.
    $ErrorActionPreference = 'Continue'
    if ($InputText) {
        $lines = @($InputText | & $Command @ArgumentList 2>&1 | ConvertTo-NativeLine -Show:$Show)
    }
    else {
        $lines = @(& $Command @ArgumentList 2>&1 | ConvertTo-NativeLine -Show:$Show)
    }
    $exitCode = $LASTEXITCODE
    [pscustomobject]@{
        ExitCode    = $exitCode
        Output      = @($lines | Where-Object { -not $_.IsError } | ForEach-Object { $_.Text })
        ErrorOutput = @($lines | Where-Object { $_.IsError } | ForEach-Object { $_.Text })
    }
}

function Invoke-AwsCli {
    <#
    .SYNOPSIS
    Runs the AWS CLI and returns its JSON answer as objects, or nothing when the error matches
    AbsentPattern. Any other failure throws, with what AWS said.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string[]]$ArgumentList,

        [string]$AbsentPattern
    )
    Write-Verbose -Message "aws $($ArgumentList -join ' ')"
    $result = Invoke-Native -Command 'aws' -ArgumentList $ArgumentList
    if ($result.ExitCode -ne 0) {
        $problem = ($result.ErrorOutput -join ' ').Trim()
        if ($AbsentPattern -and $problem -match $AbsentPattern) {
            return
        }
        throw "aws $($ArgumentList[0]) $($ArgumentList[1]) failed (exit code $($result.ExitCode)): $problem"
    }
    $text = ($result.Output -join ' ').Trim()
    if ($text) {
        ConvertFrom-Json -InputObject $text
    }
}

function Assert-Tool {
    <#
    .SYNOPSIS
    Throws unless every program is there, naming all that are missing and how to get them.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Advice
    )
    $missing = @($Advice.Keys | Sort-Object | Where-Object { -not (Get-Command -Name $_ -ErrorAction SilentlyContinue) })
    if ($missing.Count -gt 0) {
        $steps = @($missing | ForEach-Object { "$($_): $($Advice[$_])" })
        throw "Missing on this machine: $($missing -join ', '). $($steps -join ' ')"
    }
}

function Assert-Credential {
    <#
    .SYNOPSIS
    Throws unless AWS accepts the credentials; returns the account id.
    #>
    [CmdletBinding()]
    param()
    try {
        $identity = Invoke-AwsCli -ArgumentList 'sts', 'get-caller-identity'
    }
    catch {
        $advice = "Sign in with 'aws configure' or 'aws sso login', or name a profile with -AwsProfile."
        throw "AWS did not accept the credentials. $advice AWS said: $($_.Exception.Message)"
    }
    $identity.Account
}

function Get-Stack {
    <#
    .SYNOPSIS
    Returns one CloudFormation stack, or nothing when there is none of that name.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$StackName
    )
    $answer = Invoke-AwsCli -ArgumentList 'cloudformation', 'describe-stacks', '--stack-name', $StackName -AbsentPattern 'does not exist'
    if ($answer) {
        $answer.Stacks[0]
    }
}

function Get-StackValue {
    <#
    .SYNOPSIS
    Returns a stack's outputs, or its parameters, as a hashtable; an empty one when there are none.
    #>
    [CmdletBinding()]
    param(
        [AllowNull()]
        [object]$Stack,

        [Parameter(Mandatory = $true)]
        [ValidateSet('Output', 'Parameter')]
        [string]$Kind
    )
    $values = @{}
    if ($Stack -and $Kind -eq 'Output') {
        foreach ($output in $Stack.Outputs) {
            $values[$output.OutputKey] = $output.OutputValue
        }
    }
    if ($Stack -and $Kind -eq 'Parameter') {
        foreach ($parameter in $Stack.Parameters) {
            $values[$parameter.ParameterKey] = $parameter.ParameterValue
        }
    }
    $values
}

function Push-Environment {
    <#
    .SYNOPSIS
    Sets environment variables of this process and returns what they were, for Pop-Environment.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Value
    )
    $previous = @{}
    foreach ($name in $Value.Keys) {
        $previous[$name] = [Environment]::GetEnvironmentVariable($name)
        [Environment]::SetEnvironmentVariable($name, $Value[$name])
    }
    $previous
}

function Pop-Environment {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Previous
    )
    foreach ($name in $Previous.Keys) {
        $value = $Previous[$name]
        if ($null -eq $value) {
            # PowerShell would hand over an empty string for $null, and an empty AWS_PROFILE is an error.
            $value = [System.Management.Automation.Language.NullString]::Value
        }
        [Environment]::SetEnvironmentVariable($name, $value)
    }
}

function Get-AwsEnvironment {
    <#
    .SYNOPSIS
    Returns the environment the AWS CLI is run in: region, JSON answers, UTF-8 files, no pager.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$AwsRegion,

        [string]$AwsProfile
    )
    $environment = @{
        AWS_REGION            = $AwsRegion
        AWS_DEFAULT_REGION    = $AwsRegion
        AWS_DEFAULT_OUTPUT    = 'json'
        AWS_CLI_FILE_ENCODING = 'UTF-8'
    }
    if ($AwsProfile) {
        $environment['AWS_PROFILE'] = $AwsProfile
    }
    $environment
}

function Get-EcsService {
    <#
    .SYNOPSIS
    Returns the ECS service, or nothing when there is none.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$ClusterName,

        [Parameter(Mandatory = $true)]
        [string]$ServiceName
    )
    $arguments = 'ecs', 'describe-services', '--cluster', $ClusterName, '--services', $ServiceName
    $answer = Invoke-AwsCli -ArgumentList $arguments -AbsentPattern 'ClusterNotFoundException'
    $answer.services | Where-Object { $_.status -eq 'ACTIVE' } | Select-Object -First 1
}

function Get-ServiceState {
    <#
    .SYNOPSIS
    Returns Stable, Failed and Text (one line for people) of an ECS service.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [object]$Service
    )
    $deployments = @($Service.deployments)
    $primary = $deployments | Where-Object { $_.status -eq 'PRIMARY' } | Select-Object -First 1
    $full = $Service.desiredCount -gt 0 -and $Service.runningCount -eq $Service.desiredCount
    $text = "$($Service.runningCount) of $($Service.desiredCount) tasks running, $($Service.pendingCount) pending"
    [pscustomobject]@{
        Stable = $full -and $deployments.Count -eq 1 -and $primary.rolloutState -eq 'COMPLETED'
        Failed = $primary.rolloutState -eq 'FAILED'
        Text   = "$text, rollout $($primary.rolloutState)"
    }
}

# --- Checks ---------------------------------------------------------------------------------------

function ConvertTo-CheckResult {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$Check,

        [Parameter(Mandatory = $true)]
        [bool]$Passed,

        [Parameter(Mandatory = $true)]
        [string]$Detail,

        [string]$NextStep
    )
    if ($Passed) {
        $NextStep = ''
    }
    [pscustomobject]@{ Check = $Check; Passed = $Passed; Detail = $Detail; NextStep = $NextStep }
}

function Get-HealthUri {
    <#
    .SYNOPSIS
    Returns the address of /health on the host of a WebSocket endpoint.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [uri]$Endpoint
    )
    $scheme = 'http'
    if ($Endpoint.Scheme -eq 'wss') {
        $scheme = 'https'
    }
    '{0}://{1}/health' -f $scheme, $Endpoint.Authority
}

function Test-Health {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$Uri,

        [Parameter(Mandatory = $true)]
        [int]$TimeoutSeconds
    )
    # The progress bar makes Windows PowerShell's web requests many times slower.
    $ProgressPreference = 'SilentlyContinue'
    $nextStep = 'If the Targets check passes, look at DNS, the certificate and AllowedCidr; otherwise at the logs.'
    try {
        $answer = Invoke-WebRequest -Uri $Uri -UseBasicParsing -TimeoutSec $TimeoutSeconds
    }
    catch {
        $detail = "$($Uri): $($_.Exception.GetBaseException().Message) $($_.ErrorDetails.Message)".Trim()
        return ConvertTo-CheckResult -Check 'Health' -Passed $false -Detail $detail -NextStep $nextStep
    }
    $content = ([string]$answer.Content).Trim()
    $passed = $answer.StatusCode -eq 200 -and $content -match '"status"\s*:\s*"ok"'
    $detail = "$Uri answered $($answer.StatusCode) $content"
    ConvertTo-CheckResult -Check 'Health' -Passed $passed -Detail $detail -NextStep $nextStep
}

function Test-EcsService {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$ClusterName,

        [string]$ServiceName
    )
    $service = $null
    if ($ServiceName) {
        $service = Get-EcsService -ClusterName $ClusterName -ServiceName $ServiceName
    }
    if (-not $service) {
        $nextStep = 'Run deploy-ecs.ps1 to build the image and start the service.'
        return ConvertTo-CheckResult -Check 'Service' -Passed $false -Detail 'There is no service yet.' -NextStep $nextStep
    }
    $state = Get-ServiceState -Service $service
    $nextStep = "See what ECS says: aws ecs describe-services --cluster $ClusterName --services $ServiceName"
    ConvertTo-CheckResult -Check 'Service' -Passed $state.Stable -Detail $state.Text -NextStep $nextStep
}

function Test-Target {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$TargetGroupArn
    )
    $answer = Invoke-AwsCli -ArgumentList 'elbv2', 'describe-target-health', '--target-group-arn', $TargetGroupArn
    # A draining target belongs to a task that is on its way out, as it should be.
    $targets = @($answer.TargetHealthDescriptions | Where-Object { $_ -and $_.TargetHealth.State -ne 'draining' })
    $unhealthy = @($targets | Where-Object { $_.TargetHealth.State -ne 'healthy' })
    $detail = "$($targets.Count - $unhealthy.Count) of $($targets.Count) targets healthy"
    foreach ($target in $unhealthy) {
        $detail += "; $($target.Target.Id) is $($target.TargetHealth.State) ($($target.TargetHealth.Description))"
    }
    $passed = $targets.Count -gt 0 -and $unhealthy.Count -eq 0
    $nextStep = 'A new task needs up to a minute. After that the Logs say why /health is not ok.'
    ConvertTo-CheckResult -Check 'Targets' -Passed $passed -Detail $detail -NextStep $nextStep
}

function Test-Log {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$LogGroupName,

        [Parameter(Mandatory = $true)]
        [int]$LogMinutes
    )
    $start = [DateTimeOffset]::UtcNow.AddMinutes(-$LogMinutes).ToUnixTimeMilliseconds()
    $arguments = 'logs', 'filter-log-events', '--log-group-name', $LogGroupName, '--start-time', "$start", '--max-items', '200'
    $answer = Invoke-AwsCli -ArgumentList $arguments
    $events = @($answer.events | Where-Object { $_ })
    $errors = @($events | Where-Object { $_.message -match '"level"\s*:\s*"ERROR"' })
    $detail = "$($events.Count) lines in the last $LogMinutes minutes, $($errors.Count) of them errors"
    if ($events.Count -ge 200) {
        $detail = "at least $detail"
    }
    # The service writes its metrics every minute, so silence means that it does not run.
    $nextStep = "Look at the log group $LogGroupName and at the Service check."
    ConvertTo-CheckResult -Check 'Logs' -Passed ($events.Count -gt 0) -Detail $detail -NextStep $nextStep
}

function Send-WebSocketText {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [object]$Socket,

        [Parameter(Mandatory = $true)]
        [string]$Text,

        [Parameter(Mandatory = $true)]
        [System.Threading.CancellationToken]$CancellationToken
    )
    $segment = [System.ArraySegment[byte]]::new([System.Text.Encoding]::UTF8.GetBytes($Text))
    $kind = [System.Net.WebSockets.WebSocketMessageType]::Text
    $null = $Socket.SendAsync($segment, $kind, $true, $CancellationToken).GetAwaiter().GetResult()
}

function Receive-WebSocketText {
    <#
    .SYNOPSIS
    Returns the next whole message; throws when the server closes, with its code and reason.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [object]$Socket,

        [Parameter(Mandatory = $true)]
        [System.Threading.CancellationToken]$CancellationToken
    )
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

function Invoke-WebSocketRoundTrip {
    <#
    .SYNOPSIS
    Connects, reads the greeting, sends a ping and waits for the pong. Returns the milliseconds
    between the two; throws when anything else happens or the time is over.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [uri]$Endpoint,

        [string]$AccessToken,

        [string]$Origin,

        [Parameter(Mandatory = $true)]
        [int]$TimeoutSeconds
    )
    $socket = [System.Net.WebSockets.ClientWebSocket]::new()
    $timer = [System.Threading.CancellationTokenSource]::new($TimeoutSeconds * 1000)
    try {
        if ($AccessToken) {
            $socket.Options.SetRequestHeader('Authorization', "Bearer $AccessToken")
        }
        if ($Origin) {
            $socket.Options.SetRequestHeader('Origin', $Origin)
        }
        # Assigned, because PowerShell would return the empty result of a task as an object.
        $null = $socket.ConnectAsync($Endpoint, $timer.Token).GetAwaiter().GetResult()

        $greeting = ConvertFrom-Json -InputObject (Receive-WebSocketText -Socket $socket -CancellationToken $timer.Token)
        if ($greeting.type -ne 'connected') {
            throw "The first message was '$($greeting.type)' instead of 'connected'."
        }
        $watch = [System.Diagnostics.Stopwatch]::StartNew()
        Send-WebSocketText -Socket $socket -Text '{"action":"ping"}' -CancellationToken $timer.Token
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
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [uri]$Endpoint,

        [string]$AccessToken,

        [string]$Origin,

        [bool]$AuthenticationOn,

        [Parameter(Mandatory = $true)]
        [int]$TimeoutSeconds
    )
    $connection = @{ Endpoint = $Endpoint; AccessToken = $AccessToken; Origin = $Origin; TimeoutSeconds = $TimeoutSeconds }
    try {
        $milliseconds = Invoke-WebSocketRoundTrip @connection
    }
    catch {
        $problem = $_.Exception.GetBaseException().Message
        # 401 before the upgrade, or close code 4401 after it.
        if ($AuthenticationOn -and -not $AccessToken -and $problem -match '401') {
            $detail = 'Refused for want of a token, as configured. -AccessToken tests the whole round trip.'
            return ConvertTo-CheckResult -Check 'WebSocket' -Passed $true -Detail $detail
        }
        $nextStep = 'For 401 or 4401 give a valid -AccessToken, for 403 an allowed -Origin; otherwise look at the Health check.'
        return ConvertTo-CheckResult -Check 'WebSocket' -Passed $false -Detail "$($Endpoint): $problem" -NextStep $nextStep
    }
    $detail = "$Endpoint greeted and answered a ping in $milliseconds ms"
    ConvertTo-CheckResult -Check 'WebSocket' -Passed $true -Detail $detail
}

# --- All of them ----------------------------------------------------------------------------------

function Get-CheckTarget {
    <#
    .SYNOPSIS
    Returns what the checks need to know about the stack, as a hashtable.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$StackName,

        [string]$Endpoint
    )
    $stack = Get-Stack -StackName $StackName
    if (-not $stack) {
        throw "The stack '$StackName' does not exist in this account and region. Run deploy-ecs.ps1, or name the stack and region with -StackName and -AwsRegion."
    }
    $outputs = Get-StackValue -Stack $stack -Kind Output
    $parameters = Get-StackValue -Stack $stack -Kind Parameter
    $missing = @('WebSocketEndpoint', 'ECSClusterName', 'TargetGroupArn' | Where-Object { -not $outputs[$_] })
    if ($missing.Count -gt 0) {
        throw "The stack '$StackName' ($($stack.StackStatus)) lacks these outputs: $($missing -join ', '). Run deploy-ecs.ps1 to bring it into order."
    }
    if (-not $Endpoint) {
        $Endpoint = $outputs['WebSocketEndpoint']
    }
    @{
        Endpoint         = $Endpoint
        ClusterName      = $outputs['ECSClusterName']
        ServiceName      = $outputs['WebSocketServiceName']
        TargetGroupArn   = $outputs['TargetGroupArn']
        LogGroupName     = "/ecs/agenticai-websocket-$($parameters['Environment'])"
        AllowedOrigin    = ([string]$parameters['AllowedOrigins'] -split ',')[0].Trim()
        AuthenticationOn = [bool]$parameters['AuthJwksUrl']
    }
}

function Invoke-Check {
    <#
    .SYNOPSIS
    Runs one check; an error on the way becomes a failed result.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$Name,

        [Parameter(Mandatory = $true)]
        [hashtable]$Target,

        [Parameter(Mandatory = $true)]
        [hashtable]$Connection,

        [Parameter(Mandatory = $true)]
        [int]$LogMinutes
    )
    try {
        switch ($Name) {
            'Health' {
                $uri = Get-HealthUri -Endpoint $Target['Endpoint']
                Test-Health -Uri $uri -TimeoutSeconds $Connection['TimeoutSeconds']
            }
            'Service' { Test-EcsService -ClusterName $Target['ClusterName'] -ServiceName $Target['ServiceName'] }
            'Targets' { Test-Target -TargetGroupArn $Target['TargetGroupArn'] }
            'Logs' { Test-Log -LogGroupName $Target['LogGroupName'] -LogMinutes $LogMinutes }
            'WebSocket' {
                $roundTrip = @{
                    Endpoint         = $Target['Endpoint']
                    AuthenticationOn = $Target['AuthenticationOn']
                    AccessToken      = $Connection['AccessToken']
                    Origin           = $Connection['Origin']
                    TimeoutSeconds   = $Connection['TimeoutSeconds']
                }
                Test-WebSocket @roundTrip
            }
        }
    }
    catch {
        $nextStep = 'Look up what AWS said; the caller may lack the permission.'
        ConvertTo-CheckResult -Check $Name -Passed $false -Detail $_.Exception.Message -NextStep $nextStep
    }
}

function Invoke-ConnectionTest {
    <#
    .SYNOPSIS
    Runs the checks in order, repeating what fails until WaitSeconds are over; returns the results.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$StackName,

        [Parameter(Mandatory = $true)]
        [string[]]$Check,

        [string]$Endpoint,

        [string]$AccessToken,

        [string]$Origin,

        [Parameter(Mandatory = $true)]
        [int]$LogMinutes,

        [Parameter(Mandatory = $true)]
        [int]$TimeoutSeconds,

        [Parameter(Mandatory = $true)]
        [int]$WaitSeconds
    )
    Assert-Tool -Advice @{ aws = 'Install the AWS CLI, version 2, and open a new terminal.' }
    $null = Assert-Credential
    # Windows PowerShell on older systems offers nothing newer than TLS 1.0 by itself.
    $protocols = [System.Net.ServicePointManager]::SecurityProtocol
    [System.Net.ServicePointManager]::SecurityProtocol = $protocols -bor [System.Net.SecurityProtocolType]::Tls12

    $target = Get-CheckTarget -StackName $StackName -Endpoint $Endpoint
    if (-not $Origin) {
        $Origin = $target['AllowedOrigin']
    }
    $connection = @{ AccessToken = $AccessToken; Origin = $Origin; TimeoutSeconds = $TimeoutSeconds }
    $deadline = [datetime]::UtcNow.AddSeconds($WaitSeconds)
    foreach ($name in $Check) {
        $run = @{ Name = $name; Target = $target; Connection = $connection; LogMinutes = $LogMinutes }
        $result = Invoke-Check @run
        $shown = ''
        while (-not $result.Passed -and [datetime]::UtcNow -lt $deadline) {
            if ($result.Detail -ne $shown) {
                $shown = $result.Detail
                Write-Step -Message "  $($name): not yet ($shown)"
            }
            Start-Sleep -Seconds 5
            $result = Invoke-Check @run
        }
        $result
    }
}

function Show-CheckResult {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [object[]]$Result
    )
    $Result | Format-Table -Property 'Check', 'Passed', 'Detail' -AutoSize -Wrap | Out-Host
    foreach ($failed in @($Result | Where-Object { -not $_.Passed })) {
        Write-Step -Message "$($failed.Check) failed. Next: $($failed.NextStep)"
    }
}

# Dot-sourced, as the tests do it, the script only defines its functions.
if ($MyInvocation.InvocationName -ne '.') {
    $test = @{
        StackName      = $StackName
        Check          = $Check
        Endpoint       = $Endpoint
        AccessToken    = $AccessToken
        Origin         = $Origin
        LogMinutes     = $LogMinutes
        TimeoutSeconds = $TimeoutSeconds
        WaitSeconds    = $WaitSeconds
    }
    $previous = Push-Environment -Value (Get-AwsEnvironment -AwsRegion $AwsRegion -AwsProfile $AwsProfile)
    try {
        $results = @(Invoke-ConnectionTest @test)
    }
    catch {
        $Host.UI.WriteErrorLine("test-connection: $($_.Exception.Message)")
        Write-Verbose -Message $_.ScriptStackTrace
        exit 1
    }
    finally {
        Pop-Environment -Previous $previous
    }
    if ($PassThru) {
        $results
    }
    else {
        Show-CheckResult -Result $results
    }
    if (@($results | Where-Object { -not $_.Passed }).Count -gt 0) {
        exit 1
    }
    exit 0
}
