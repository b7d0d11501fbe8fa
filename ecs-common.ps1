# What deploy-ecs.ps1 and test-connection.ps1 share; both dot-source it. By itself it only defines
# functions. They read the parameters of the script that runs, such as $AwsProfile.

Set-StrictMode -Version 3.0
$ErrorActionPreference = 'Stop'

function Write-Step {
    [CmdletBinding()] param([string]$Message)
    # Whole lines, whatever the width of the window: a log file of them can be searched.
    Write-Information -MessageData $Message -InformationAction Continue
}

# Runs a program. Returns ExitCode, Output and ErrorOutput (lines); a failure does not throw.
function Invoke-Native {
    [CmdletBinding()] param([string]$Command, [string[]]$ArgumentList, [string]$InputText, [switch]$Show)
    # Windows PowerShell makes an error record of every redirected stderr line, and 'Stop' would end
    # the script at the first one: a progress line of docker, a warning of aws.
    $ErrorActionPreference = 'Continue'
    $output = [System.Collections.ArrayList]::new()
    $errorOutput = [System.Collections.ArrayList]::new()
    $keep = {
        $text = [string]$_
        if ($_ -is [System.Management.Automation.ErrorRecord]) {
            $text = $_.Exception.Message
            $null = $errorOutput.Add($text)
        }
        else {
            $null = $output.Add($text)
        }
        if ($Show) {
            Write-Step -Message "    $text"
        }
    }
    if ($InputText) {
        $InputText | & $Command @ArgumentList 2>&1 | ForEach-Object -Process $keep
    }
    else {
        & $Command @ArgumentList 2>&1 | ForEach-Object -Process $keep
    }
    [pscustomobject]@{ ExitCode = $LASTEXITCODE; Output = @($output); ErrorOutput = @($errorOutput) }
}

# Runs the AWS CLI and returns its JSON answer as objects, or nothing when the error matches
# AbsentPattern. Any other failure throws, with what AWS said.
function Invoke-AwsCli {
    [CmdletBinding()] param([string[]]$ArgumentList, [string]$AbsentPattern, [switch]$Raw)
    # On the command line a profile wins over the keys in the environment; in AWS_PROFILE it loses.
    if ($AwsProfile) {
        $ArgumentList += '--profile', $AwsProfile
    }
    Write-Verbose -Message "aws $($ArgumentList -join ' ')"
    $result = Invoke-Native -Command 'aws' -ArgumentList $ArgumentList
    if ($result.ExitCode -ne 0) {
        $problem = ($result.ErrorOutput -join ' ').Trim()
        if ($AbsentPattern -and $problem -match $AbsentPattern) {
            return
        }
        $advice = ''
        if ($problem -match 'credentials|token .*(invalid|expired)|ExpiredToken|config profile|SSO') {
            $advice = "Sign in with 'aws configure' or 'aws sso login', or name a profile with -AwsProfile. "
        }
        throw "$($advice)aws $($ArgumentList[0]) $($ArgumentList[1]) failed (exit code $($result.ExitCode)): $problem"
    }
    $text = ($result.Output -join ' ').Trim()
    if ($Raw) {
        return $text
    }
    if ($text) {
        # By a variable, because Windows PowerShell hands an array on as one object.
        $answer = ConvertFrom-Json -InputObject $text
        $answer
    }
}

# Sets environment variables of this process. Returns what they were, to be set again at the end.
function Set-ProcessEnvironment {
    [CmdletBinding()] param([hashtable]$Value)
    $before = @{}
    foreach ($name in $Value.Keys) {
        $before[$name] = [Environment]::GetEnvironmentVariable($name)
        $new = $Value[$name]
        if ($null -eq $new) {
            # PowerShell would hand over an empty string for $null, and an empty AWS_REGION is an error.
            $new = [System.Management.Automation.Language.NullString]::Value
        }
        [Environment]::SetEnvironmentVariable($name, $new)
    }
    $before
}

# Returns the environment the AWS CLI is run in: region, JSON answers, UTF-8 files, no questions.
function Get-AwsEnvironment {
    [CmdletBinding()] param()
    @{
        AWS_REGION            = $AwsRegion
        AWS_DEFAULT_REGION    = $AwsRegion
        AWS_DEFAULT_OUTPUT    = 'json'
        AWS_CLI_FILE_ENCODING = 'UTF-8'
        AWS_CLI_AUTO_PROMPT   = 'off'
    }
}

# Throws unless every program is there, naming all that are missing and how to get them.
function Assert-Tool {
    [CmdletBinding()] param([hashtable]$Advice)
    $missing = @($Advice.Keys | Sort-Object | Where-Object { -not (Get-Command -Name $_ -ErrorAction SilentlyContinue) })
    if ($missing.Count -gt 0) {
        $steps = @($missing | ForEach-Object { "$($_): $($Advice[$_])" })
        throw "Missing on this machine: $($missing -join ', '). $($steps -join ' ')"
    }
}

# Shows who is calling, in which account and region; throws unless AWS accepts the credentials.
function Assert-Credential {
    [CmdletBinding()] param()
    $caller = Invoke-AwsCli -ArgumentList 'sts', 'get-caller-identity'
    Write-Step -Message "  account $($caller.Account), region $AwsRegion, as $($caller.Arn)"
}

# Returns Id, Name, Status, Reason, Parameter and Output (hashtables) of a stack by its name or
# id; nothing when there is none.
function Get-Stack {
    [CmdletBinding()] param([string]$Name)
    $query = 'Stacks[0].{Id:StackId,Name:StackName,Status:StackStatus,Reason:StackStatusReason,Parameters:Parameters[].[ParameterKey,ParameterValue],Outputs:Outputs[].[OutputKey,OutputValue]}'
    $arguments = 'cloudformation', 'describe-stacks', '--stack-name', $Name, '--query', $query
    $stack = Invoke-AwsCli -ArgumentList $arguments -AbsentPattern 'does not exist'
    if ($stack) {
        [pscustomobject]@{
            Id        = $stack.Id
            Name      = $stack.Name
            Status    = $stack.Status
            Reason    = $stack.Reason
            Parameter = ConvertTo-Table -Pair $stack.Parameters
            Output    = ConvertTo-Table -Pair $stack.Outputs
        }
    }
}

function ConvertTo-Table {
    [CmdletBinding()] param([AllowNull()][object[]]$Pair)
    $table = @{}
    foreach ($one in $Pair) {
        $table[$one[0]] = $one[1]
    }
    $table
}

# Returns Stable, Text (one line for people) and Events (newest first) of an ECS service;
# nothing when there is none.
function Get-ServiceState {
    [CmdletBinding()] param([string]$ClusterName, [string]$ServiceName)
    $query = "services[?status=='ACTIVE'].{Desired:desiredCount,Running:runningCount,Pending:pendingCount,Deployments:deployments[].status,Rollout:deployments[?status=='PRIMARY'].rolloutState,Events:events[].message}"
    $arguments = 'ecs', 'describe-services', '--cluster', $ClusterName, '--services', $ServiceName, '--query', $query
    $service = Invoke-AwsCli -ArgumentList $arguments -AbsentPattern 'ClusterNotFoundException' | Select-Object -First 1
    if ($service) {
        $rollout = @($service.Rollout) -join ''
        $full = $service.Desired -gt 0 -and $service.Running -eq $service.Desired
        [pscustomobject]@{
            Stable = $full -and @($service.Deployments).Count -eq 1 -and $rollout -eq 'COMPLETED'
            Text   = "$($service.Running) of $($service.Desired) tasks running, $($service.Pending) pending, rollout $rollout"
            Events = @($service.Events | Where-Object { $_ })
        }
    }
}
