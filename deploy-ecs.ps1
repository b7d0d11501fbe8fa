<#
.SYNOPSIS
Deploys the WebSocket gateway to ECS Fargate with one command, and checks that it works.

.DESCRIPTION
Checks its tools and credentials, reads what the platform's main stack exports, deploys
ecs-template.yaml, builds the image for the right processor, pushes it under the git revision,
deploys it by digest, waits until the service is stable, and tests the result with
test-connection.ps1.

It may be run again at any time. After a failure it picks up where it can: a stack that never stood
is made anew, a stuck rollback is finished, an operation under way is waited for, an image pushed
before is used again. A second run with nothing changed changes nothing. Template parameters that
are not given keep the values they have. A failed rollout is rolled back, its reason and the last
log lines are shown, and the exit code is 1.

The image's tag is the git revision and the processor, such as 3f2a9c1b7d10-amd64. When the files
that go into the image differ from that revision, a hash of their content is part of the tag.

Needs the AWS CLI (version 1 or 2), signed in, and Docker with Linux containers. Runs on Windows
PowerShell 5.1 and PowerShell 7. With -WhatIf it reads, and says what it would do.

.PARAMETER Environment
Name of the environment; part of the names of the cluster, the service and everything else.

.PARAMETER AwsRegion
Region to deploy to.

.PARAMETER AwsProfile
Profile of the AWS CLI to use instead of the default one.

.PARAMETER StackName
CloudFormation stack of the gateway. Each environment needs its own.

.PARAMETER MainStackName
CloudFormation stack of the platform, whose outputs name the table and the agents' queues.

.PARAMETER CertificateArn
ACM certificate for wss:// on port 443. An empty string takes TLS away again.

.PARAMETER DomainName
Name the clients connect to. The default is the certificate's own name.

.PARAMETER HostedZoneId
Route 53 zone to keep the domain's record in. Without it you keep the record yourself.

.PARAMETER CpuArchitecture
Processor of the tasks, X86_64 or ARM64; the image is built for it.

.PARAMETER VpcId
VPC to deploy to. The default is the region's default VPC, or the only one there is.

.PARAMETER LoadBalancerSubnetId
Public subnets of the load balancer, in two zones or more. Needs VpcId. Found unless given.

.PARAMETER TaskSubnetId
Subnets of the tasks, in the same zones. Needs VpcId. The default is private subnets with a NAT
route where there are two, and otherwise the load balancer's.

.PARAMETER ParameterOverride
Any further parameters of ecs-template.yaml, such as @{ MaxTasks = 8; LogLevel = 'DEBUG' }.

.PARAMETER AccessToken
Token for the final round trip, where the gateway asks for one. The default is $env:AGENTICAI_TOKEN.

.PARAMETER TimeoutMinutes
How long to wait for each stack operation, and for the service to become stable.

.EXAMPLE
./deploy-ecs.ps1

Deploys the production environment to us-east-1.

.EXAMPLE
./deploy-ecs.ps1 -WhatIf

Reads everything and says what would be done.

.EXAMPLE
./deploy-ecs.ps1 -Environment staging -StackName agenticai-websocket-staging -AwsRegion eu-west-1 -CpuArchitecture ARM64

Deploys a second environment, on cheaper processors, to another region.

.EXAMPLE
./deploy-ecs.ps1 -CertificateArn arn:aws:acm:us-east-1:123456789012:certificate/1234abcd -HostedZoneId Z123EXAMPLE -ParameterOverride @{ AuthJwksUrl = 'https://idp.example.com/jwks.json'; AuthIssuer = 'https://idp.example.com'; AuthAudience = 'agenticai'; AllowedOrigins = 'https://app.example.com' }

Turns on TLS under the certificate's name, authentication and the origin check.
#>
[CmdletBinding(SupportsShouldProcess = $true)]
param(
    [ValidatePattern('(?-i)^[a-z][a-z0-9]{0,11}$')]
    [string]$Environment = 'prod',

    [ValidatePattern('(?-i)^[a-z]{2}(-[a-z]+)+-\d$')]
    [string]$AwsRegion = 'us-east-1',

    [ValidateNotNullOrEmpty()]
    [string]$AwsProfile,

    [ValidatePattern('^[A-Za-z][A-Za-z0-9-]{0,127}$')]
    [string]$StackName = 'agenticai-websocket-stack',

    [ValidatePattern('^[A-Za-z][A-Za-z0-9-]{0,127}$')]
    [string]$MainStackName = 'agenticai-stack',

    [ValidatePattern('^(arn:aws[a-z-]*:acm:[a-z0-9-]+:\d{12}:certificate/[A-Za-z0-9-]+)?$')]
    [string]$CertificateArn,

    [ValidatePattern('^([A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+)?$')]
    [string]$DomainName,

    [ValidatePattern('(?-i)^(Z[A-Z0-9]{1,31})?$')]
    [string]$HostedZoneId,

    [ValidateSet('X86_64', 'ARM64')]
    [string]$CpuArchitecture,

    [ValidatePattern('^vpc-[0-9a-f]+$')]
    [string]$VpcId,

    [ValidatePattern('^subnet-[0-9a-f]+$')]
    [string[]]$LoadBalancerSubnetId,

    [ValidatePattern('^subnet-[0-9a-f]+$')]
    [string[]]$TaskSubnetId,

    [ValidateNotNull()]
    [hashtable]$ParameterOverride = @{},

    [string]$AccessToken = $env:AGENTICAI_TOKEN,

    [ValidateRange(5, 180)]
    [int]$TimeoutMinutes = 30
)

$ErrorActionPreference = 'Stop'

# --- Programs and environment: the same text as in test-connection.ps1 ----------------------------

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

# --- What is there: read only ---------------------------------------------------------------------

function Assert-DockerEngine {
    <#
    .SYNOPSIS
    Throws unless Docker's engine answers and runs Linux containers.
    #>
    [CmdletBinding()]
    param()
    $result = Invoke-Native -Command 'docker' -ArgumentList 'version', '--format', '{{.Server.Os}}'
    if ($result.ExitCode -ne 0) {
        $problem = ($result.ErrorOutput -join ' ').Trim()
        throw "Docker's engine does not answer. Start Docker Desktop (on Linux: sudo systemctl start docker). Docker said: $problem"
    }
    if (($result.Output -join '').Trim() -eq 'windows') {
        throw 'Docker runs Windows containers here. Choose "Switch to Linux containers" in the menu of Docker Desktop.'
    }
}

function Get-MainStackOutput {
    <#
    .SYNOPSIS
    Returns the main stack's outputs that the template's parameters of the same names take, as a
    hashtable; throws naming every one that is missing.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$MainStackName
    )
    $required = 'DataTableName', 'PMQueueUrl', 'DevQueueUrl', 'QAQueueUrl', 'OpsQueueUrl'
    $stack = Get-Stack -StackName $MainStackName
    if (-not $stack) {
        throw "The platform's main stack '$MainStackName' does not exist in this account and region. Deploy it first, or name it with -MainStackName (and -AwsRegion)."
    }
    $outputs = Get-StackValue -Stack $stack -Kind Output
    $missing = @($required | Where-Object { -not $outputs[$_] })
    if ($missing.Count -gt 0) {
        throw "The main stack '$MainStackName' ($($stack.StackStatus)) lacks these outputs: $($missing -join ', '). Add them to its template and update it, or name another stack with -MainStackName."
    }
    $values = @{}
    foreach ($name in $required) {
        $values[$name] = $outputs[$name]
    }
    $values
}

function Assert-GatewayStack {
    <#
    .SYNOPSIS
    Throws when the stack was made from another template or for another environment.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [object]$Stack,

        [Parameter(Mandatory = $true)]
        [string]$Environment
    )
    if ($Stack.StackStatus -eq 'REVIEW_IN_PROGRESS') {
        return  # no more than a name yet
    }
    $parameters = Get-StackValue -Stack $Stack -Kind Parameter
    if (-not $parameters.ContainsKey('ContainerImage') -or -not $parameters['Environment']) {
        throw "The stack '$($Stack.StackName)' was not made from ecs-template.yaml, and updating it would delete what is in it. Choose another -StackName."
    }
    if ($parameters['Environment'] -ne $Environment) {
        throw "The stack '$($Stack.StackName)' is the environment '$($parameters['Environment'])'. Say -Environment $($parameters['Environment']) to update it, or choose another -StackName for '$Environment'."
    }
}

function Get-TemplateParameter {
    <#
    .SYNOPSIS
    Returns the template's parameters as a hashtable of name and default.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$TemplatePath
    )
    $summary = Invoke-AwsCli -ArgumentList 'cloudformation', 'get-template-summary', '--template-body', "file://$TemplatePath"
    $defaults = @{}
    foreach ($parameter in $summary.Parameters) {
        $defaults[$parameter.ParameterKey] = $parameter.DefaultValue
    }
    $defaults
}

function Get-VpcId {
    <#
    .SYNOPSIS
    Returns the region's default VPC, or the only one there is; throws when there is a choice.
    #>
    [CmdletBinding()]
    param()
    $vpcs = @((Invoke-AwsCli -ArgumentList 'ec2', 'describe-vpcs').Vpcs | Where-Object { $_ })
    $default = @($vpcs | Where-Object { $_.IsDefault })
    if ($default.Count -gt 0) {
        return $default[0].VpcId
    }
    if ($vpcs.Count -eq 1) {
        return $vpcs[0].VpcId
    }
    if ($vpcs.Count -eq 0) {
        throw "There is no VPC in this region. Make the default one with 'aws ec2 create-default-vpc', or name another region."
    }
    $names = @($vpcs | ForEach-Object { "$($_.VpcId) ($($_.CidrBlock))" })
    throw "There is no default VPC, but there are $($vpcs.Count) others. Say which one with -VpcId: $($names -join ', ')"
}

function Get-RouteKind {
    <#
    .SYNOPSIS
    Returns where a subnet's default route goes: Public (internet gateway), Nat, or None.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$SubnetId,

        [Parameter(Mandatory = $true)]
        [object[]]$RouteTable
    )
    $table = $RouteTable | Where-Object { $_.Associations.SubnetId -contains $SubnetId } | Select-Object -First 1
    if (-not $table) {
        # A subnet without a table of its own follows the VPC's main one.
        $table = $RouteTable | Where-Object { $_.Associations.Main -contains $true } | Select-Object -First 1
    }
    $routes = @($table.Routes | Where-Object { $_.DestinationCidrBlock -eq '0.0.0.0/0' -and $_.State -eq 'active' })
    if (@($routes | Where-Object { $_.GatewayId -like 'igw-*' }).Count -gt 0) {
        return 'Public'
    }
    if (@($routes | Where-Object { $_.NatGatewayId }).Count -gt 0) {
        return 'Nat'
    }
    'None'
}

function Get-VpcSubnet {
    <#
    .SYNOPSIS
    Returns Id, Zone and Kind (Public, Nat, None) of a VPC's subnets, sorted by zone and id.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$VpcId,

        [Parameter(Mandatory = $true)]
        [string]$AwsRegion
    )
    $filter = "Name=vpc-id,Values=$VpcId"
    $subnets = @((Invoke-AwsCli -ArgumentList 'ec2', 'describe-subnets', '--filters', $filter).Subnets | Where-Object { $_ })
    $tables = @((Invoke-AwsCli -ArgumentList 'ec2', 'describe-route-tables', '--filters', $filter).RouteTables | Where-Object { $_ })
    if ($subnets.Count -eq 0 -or $tables.Count -eq 0) {
        throw "The VPC $VpcId has no subnets in $AwsRegion. Name another one with -VpcId."
    }
    # Neither local zones nor outposts, whose names are longer: Fargate does not run there.
    $zonePattern = '^' + $AwsRegion + '[a-z]$'
    foreach ($subnet in ($subnets | Sort-Object -Property 'AvailabilityZone', 'SubnetId')) {
        if ($subnet.AvailabilityZone -match $zonePattern -and -not $subnet.OutpostArn) {
            [pscustomobject]@{
                Id   = $subnet.SubnetId
                Zone = $subnet.AvailabilityZone
                Kind = Get-RouteKind -SubnetId $subnet.SubnetId -RouteTable $tables
            }
        }
    }
}

function Select-Subnet {
    <#
    .SYNOPSIS
    Chooses two zones with a public subnet each for the load balancer, and the tasks' subnets in the
    same zones: those with a NAT route where both zones have one, else the public ones.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [AllowEmptyCollection()]
        [object[]]$Subnet
    )
    $public = @{}
    $nat = @{}
    foreach ($one in $Subnet) {
        if ($one.Kind -eq 'Public' -and -not $public.ContainsKey($one.Zone)) {
            $public[$one.Zone] = $one.Id
        }
        if ($one.Kind -eq 'Nat' -and -not $nat.ContainsKey($one.Zone)) {
            $nat[$one.Zone] = $one.Id
        }
    }
    $zones = @($public.Keys | Sort-Object)
    if ($zones.Count -lt 2) {
        throw "The load balancer needs public subnets in two zones, and there are $($zones.Count) (with a route to an internet gateway). Add one, name another VPC with -VpcId, or name subnets with -LoadBalancerSubnetId."
    }
    $natZones = @($zones | Where-Object { $nat.ContainsKey($_) })
    if ($natZones.Count -ge 2) {
        $chosen = $natZones[0..1]
        $tasks = @($chosen | ForEach-Object { $nat[$_] })
        $publicAddress = 'DISABLED'
    }
    else {
        $chosen = $zones[0..1]
        $tasks = @($chosen | ForEach-Object { $public[$_] })
        $publicAddress = 'ENABLED'
    }
    @{
        LoadBalancerSubnetIds = @($chosen | ForEach-Object { $public[$_] }) -join ','
        TaskSubnetIds         = $tasks -join ','
        AssignPublicIp        = $publicAddress
    }
}

function Get-NetworkParameter {
    <#
    .SYNOPSIS
    Returns the template's four network parameters, from what was given and what is found.
    #>
    [CmdletBinding()]
    param(
        [string]$VpcId,

        [string[]]$LoadBalancerSubnetId,

        [string[]]$TaskSubnetId,

        [Parameter(Mandatory = $true)]
        [string]$AwsRegion
    )
    if (-not $VpcId) {
        if ($LoadBalancerSubnetId -or $TaskSubnetId) {
            throw '-LoadBalancerSubnetId and -TaskSubnetId need the -VpcId they belong to.'
        }
        $VpcId = Get-VpcId
    }
    $subnets = @(Get-VpcSubnet -VpcId $VpcId -AwsRegion $AwsRegion)
    $foreign = @(@($LoadBalancerSubnetId) + @($TaskSubnetId) | Where-Object { $_ -and $subnets.Id -notcontains $_ })
    if ($foreign.Count -gt 0) {
        throw "Not subnets of $VpcId in a zone of $($AwsRegion): $($foreign -join ', ')"
    }
    if (-not $LoadBalancerSubnetId) {
        $network = Select-Subnet -Subnet $subnets
    }
    else {
        $network = @{ LoadBalancerSubnetIds = $LoadBalancerSubnetId -join ','; TaskSubnetIds = $LoadBalancerSubnetId -join ','; AssignPublicIp = 'ENABLED' }
    }
    if ($TaskSubnetId) {
        $kinds = @($subnets | Where-Object { $TaskSubnetId -contains $_.Id } | ForEach-Object { $_.Kind })
        $network['TaskSubnetIds'] = $TaskSubnetId -join ','
        $network['AssignPublicIp'] = 'DISABLED'
        if ($kinds -contains 'Public') {
            $network['AssignPublicIp'] = 'ENABLED'
        }
    }
    $network['VpcId'] = $VpcId
    $network
}

function Get-CertificateDomain {
    <#
    .SYNOPSIS
    Returns the first name a certificate covers that is no wildcard.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$CertificateArn
    )
    $certificate = (Invoke-AwsCli -ArgumentList 'acm', 'describe-certificate', '--certificate-arn', $CertificateArn).Certificate
    if ($certificate.Status -ne 'ISSUED') {
        throw "The certificate is $($certificate.Status), not ISSUED. Complete its validation in ACM first."
    }
    $names = @(@($certificate.DomainName) + @($certificate.SubjectAlternativeNames) | Where-Object { $_ -and $_ -notlike '*[*]*' })
    if ($names.Count -eq 0) {
        throw "The certificate covers $($certificate.DomainName). Say with -DomainName which name the clients connect to."
    }
    $names[0]
}

# --- Template parameters --------------------------------------------------------------------------

function ConvertTo-ParameterValue {
    <#
    .SYNOPSIS
    Returns a value as CloudFormation wants it: lists with commas, booleans in lower case.
    #>
    [CmdletBinding()]
    param(
        [AllowNull()]
        [object]$Value
    )
    if ($Value -is [bool]) {
        return ([string]$Value).ToLowerInvariant()
    }
    if ($Value -is [array]) {
        return $Value -join ','
    }
    [string]$Value
}

function Resolve-Override {
    <#
    .SYNOPSIS
    Returns the overrides under the template's own spelling, as strings; throws for unknown names.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [AllowEmptyCollection()]
        [hashtable]$Override,

        [Parameter(Mandatory = $true)]
        [hashtable]$Template
    )
    $unknown = @($Override.Keys | Where-Object { -not $Template.ContainsKey($_) } | Sort-Object)
    if ($unknown.Count -gt 0) {
        $known = @($Template.Keys | Sort-Object)
        throw "ecs-template.yaml has no parameter $($unknown -join ', '). Its parameters are: $($known -join ', ')"
    }
    $reserved = @('ContainerImage', 'Environment' | Where-Object { $Override.ContainsKey($_) })
    if ($reserved.Count -gt 0) {
        throw "-ParameterOverride cannot set $($reserved -join ', '): the image is the one built here, and -Environment names the environment."
    }
    $resolved = @{}
    foreach ($name in $Template.Keys) {
        if ($Override.ContainsKey($name)) {
            $resolved[$name] = ConvertTo-ParameterValue -Value $Override[$name]
        }
    }
    $resolved
}

function Get-EffectiveValue {
    <#
    .SYNOPSIS
    Returns what a template parameter will be: the given value, else the stack's, else the default.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$Name,

        [Parameter(Mandatory = $true)]
        [hashtable]$Given,

        [Parameter(Mandatory = $true)]
        [AllowEmptyCollection()]
        [hashtable]$Previous,

        [Parameter(Mandatory = $true)]
        [hashtable]$Template
    )
    if ($Given.ContainsKey($Name)) {
        return $Given[$Name]
    }
    if ($Previous.ContainsKey($Name)) {
        return $Previous[$Name]
    }
    $Template[$Name]
}

function Merge-StackParameter {
    <#
    .SYNOPSIS
    Returns Name, Value and Keep for each parameter to send; what is in neither place has a default.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Given,

        [Parameter(Mandatory = $true)]
        [AllowEmptyCollection()]
        [hashtable]$Previous,

        [Parameter(Mandatory = $true)]
        [hashtable]$Template
    )
    foreach ($name in @($Template.Keys | Sort-Object)) {
        if ($Given.ContainsKey($name)) {
            [pscustomobject]@{ Name = $name; Value = $Given[$name]; Keep = $false }
        }
        elseif ($Previous.ContainsKey($name)) {
            [pscustomobject]@{ Name = $name; Value = $Previous[$name]; Keep = $true }
        }
    }
}

function ConvertTo-ParameterJson {
    <#
    .SYNOPSIS
    Returns the parameters as the JSON list that --parameters reads from a file.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [object[]]$Parameter
    )
    # One by one, because Windows PowerShell writes some arrays as an object with a count.
    $entries = foreach ($one in $Parameter) {
        if ($one.Keep) {
            ConvertTo-Json -Compress -InputObject @{ ParameterKey = $one.Name; UsePreviousValue = $true }
        }
        else {
            ConvertTo-Json -Compress -InputObject @{ ParameterKey = $one.Name; ParameterValue = [string]$one.Value }
        }
    }
    '[' + ($entries -join ',') + ']'
}

# --- The stack ------------------------------------------------------------------------------------

function Get-RequestToken {
    <#
    .SYNOPSIS
    Returns a new name for a change set or an operation; the operation's events carry it.
    #>
    [CmdletBinding()]
    param()
    'deploy-' + [guid]::NewGuid().ToString()
}

function Wait-StackIdle {
    <#
    .SYNOPSIS
    Waits until no operation is under way and returns the stack, or nothing when there is none.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$StackName,

        [Parameter(Mandatory = $true)]
        [int]$TimeoutMinutes
    )
    $deadline = [datetime]::UtcNow.AddMinutes($TimeoutMinutes)
    $stack = Get-Stack -StackName $StackName
    $shown = ''
    while ($stack.StackStatus -like '*_IN_PROGRESS' -and $stack.StackStatus -ne 'REVIEW_IN_PROGRESS') {
        if ([datetime]::UtcNow -ge $deadline) {
            throw "The stack '$StackName' is still $($stack.StackStatus) after $TimeoutMinutes minutes. Run this script again when it is done."
        }
        if ($stack.StackStatus -ne $shown) {
            $shown = $stack.StackStatus
            Write-Step -Message "  another operation is under way ($shown); waiting for its end"
        }
        Start-Sleep -Seconds 10
        $stack = Get-Stack -StackName $StackName
    }
    $stack
}

function Wait-StackOperation {
    <#
    .SYNOPSIS
    Shows an operation's events, and the service's progress, until it has ended. Returns the
    stack's Status and the reasons of all Failures.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$StackId,

        [Parameter(Mandatory = $true)]
        [string]$Token,

        [Parameter(Mandatory = $true)]
        [int]$TimeoutMinutes,

        [string]$ClusterName,

        [string]$ServiceName
    )
    $deadline = [datetime]::UtcNow.AddMinutes($TimeoutMinutes)
    $seen = @{}
    $failures = @()
    $status = ''
    $progress = ''
    $arguments = 'cloudformation', 'describe-stack-events', '--stack-name', $StackId, '--max-items', '100'
    while (-not $status) {
        # The token tells this operation's events from earlier ones, the newest of which come first.
        $events = @((Invoke-AwsCli -ArgumentList $arguments).StackEvents | Where-Object { $_.ClientRequestToken -eq $Token })
        [array]::Reverse($events)
        foreach ($stackEvent in @($events | Where-Object { -not $seen.ContainsKey($_.EventId) })) {
            $seen[$stackEvent.EventId] = $true
            $line = "$($stackEvent.ResourceStatus) $($stackEvent.LogicalResourceId) $($stackEvent.ResourceStatusReason)".Trim()
            Write-Step -Message "  $line"
            # What was cancelled failed only because something else did.
            if ($stackEvent.ResourceStatus -like '*_FAILED' -and $stackEvent.ResourceStatusReason -notlike '*cancelled*') {
                $failures += $line
            }
            if ($stackEvent.PhysicalResourceId -eq $StackId -and $stackEvent.ResourceStatus -notlike '*_IN_PROGRESS') {
                $status = $stackEvent.ResourceStatus
            }
        }
        if (-not $status) {
            if ([datetime]::UtcNow -ge $deadline) {
                throw "The stack operation is not done after $TimeoutMinutes minutes and goes on in AWS. Run this script again: it waits for the end and goes on from there."
            }
            if ($ServiceName) {
                $progress = Show-ServiceProgress -ClusterName $ClusterName -ServiceName $ServiceName -Shown $progress
            }
            Start-Sleep -Seconds 5
        }
    }
    [pscustomobject]@{ Status = $status; Failures = $failures }
}

function Show-ServiceProgress {
    <#
    .SYNOPSIS
    Shows how far the service is unless that was shown last; returns what is shown now.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$ClusterName,

        [Parameter(Mandatory = $true)]
        [string]$ServiceName,

        [string]$Shown
    )
    $service = Get-EcsService -ClusterName $ClusterName -ServiceName $ServiceName
    if (-not $service) {
        return $Shown
    }
    $text = (Get-ServiceState -Service $service).Text
    if ($text -ne $Shown) {
        Write-Step -Message "  service: $text"
    }
    $text
}

function Repair-Stack {
    <#
    .SYNOPSIS
    Brings a stack that an earlier failure left unusable into order. Returns the stack, or nothing
    when there is none any more.
    #>
    [CmdletBinding(SupportsShouldProcess = $true)]
    param(
        [Parameter(Mandatory = $true)]
        [object]$Stack,

        [Parameter(Mandatory = $true)]
        [int]$TimeoutMinutes
    )
    $id = $Stack.StackId
    $status = $Stack.StackStatus
    $token = Get-RequestToken
    if ('ROLLBACK_COMPLETE', 'ROLLBACK_FAILED', 'CREATE_FAILED' -contains $status) {
        $action = 'delete what its failed creation left'
        $wanted = 'DELETE_COMPLETE'
        $arguments = 'cloudformation', 'delete-stack', '--stack-name', $id, '--client-request-token', $token
    }
    elseif ($status -eq 'UPDATE_ROLLBACK_FAILED') {
        $action = 'continue the rollback of its failed update'
        $wanted = 'UPDATE_ROLLBACK_COMPLETE'
        $arguments = 'cloudformation', 'continue-update-rollback', '--stack-name', $id, '--client-request-token', $token
    }
    elseif ($status -eq 'UPDATE_FAILED') {
        $action = 'roll its failed update back'
        $wanted = 'UPDATE_ROLLBACK_COMPLETE'
        $arguments = 'cloudformation', 'rollback-stack', '--stack-name', $id, '--client-request-token', $token
    }
    elseif ($status -eq 'DELETE_FAILED') {
        throw "Deleting the stack '$($Stack.StackName)' failed ($($Stack.StackStatusReason)). Finish that first: aws cloudformation delete-stack --stack-name $($Stack.StackName)"
    }
    else {
        return $Stack
    }
    if (-not $PSCmdlet.ShouldProcess("stack $($Stack.StackName) ($status)", $action)) {
        return $Stack
    }
    Write-Step -Message "The stack is $($status): $action"
    $null = Invoke-AwsCli -ArgumentList $arguments
    $end = Wait-StackOperation -StackId $id -Token $token -TimeoutMinutes $TimeoutMinutes
    if ($end.Status -ne $wanted) {
        throw "The stack '$($Stack.StackName)' is $($end.Status): $($end.Failures -join '; '). Remove the cause named there and run this script again."
    }
    Get-Stack -StackName $Stack.StackName
}

function Add-ChangeSet {
    <#
    .SYNOPSIS
    Asks CloudFormation what would change. Returns the change set, or nothing when nothing would.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$StackName,

        [Parameter(Mandatory = $true)]
        [string]$Name,

        [Parameter(Mandatory = $true)]
        [ValidateSet('CREATE', 'UPDATE')]
        [string]$Type,

        [Parameter(Mandatory = $true)]
        [string]$TemplatePath,

        [Parameter(Mandatory = $true)]
        [object[]]$Parameter
    )
    $unchanged = 'No updates are to be performed|contain changes'
    # By file: Windows PowerShell strips the quotes from JSON on a command line, and writes a byte
    # order mark, which the AWS CLI cannot read, with its own cmdlets.
    $file = [System.IO.Path]::GetTempFileName()
    try {
        [System.IO.File]::WriteAllText($file, (ConvertTo-ParameterJson -Parameter $Parameter))
        $arguments = @(
            'cloudformation', 'create-change-set', '--stack-name', $StackName, '--change-set-name', $Name,
            '--change-set-type', $Type, '--template-body', "file://$TemplatePath",
            '--parameters', "file://$file", '--capabilities', 'CAPABILITY_NAMED_IAM'
        )
        $id = (Invoke-AwsCli -ArgumentList $arguments -AbsentPattern $unchanged).Id
    }
    finally {
        [System.IO.File]::Delete($file)
    }
    if (-not $id) {
        return
    }
    $deadline = [datetime]::UtcNow.AddMinutes(10)
    do {
        if ([datetime]::UtcNow -ge $deadline) {
            throw "CloudFormation has not worked out the changes to '$StackName' within 10 minutes. Run this script again."
        }
        Start-Sleep -Seconds 2
        $changeSet = Invoke-AwsCli -ArgumentList 'cloudformation', 'describe-change-set', '--change-set-name', $id
    } while ('CREATE_PENDING', 'CREATE_IN_PROGRESS' -contains $changeSet.Status)
    if ($changeSet.Status -eq 'CREATE_COMPLETE') {
        return $changeSet
    }
    $null = Invoke-AwsCli -ArgumentList 'cloudformation', 'delete-change-set', '--change-set-name', $id
    if ($changeSet.StatusReason -notmatch $unchanged) {
        throw "CloudFormation does not accept the change to '$StackName': $($changeSet.StatusReason)"
    }
}

function Publish-Stack {
    <#
    .SYNOPSIS
    Creates or updates the stack. Returns Changed, Unchanged, or Skipped (-WhatIf, -Confirm);
    throws with the reasons when the operation fails.
    #>
    [CmdletBinding(SupportsShouldProcess = $true)]
    param(
        [Parameter(Mandatory = $true)]
        [string]$StackName,

        [Parameter(Mandatory = $true)]
        [bool]$Exists,

        [Parameter(Mandatory = $true)]
        [string]$TemplatePath,

        [Parameter(Mandatory = $true)]
        [object[]]$Parameter,

        [Parameter(Mandatory = $true)]
        [int]$TimeoutMinutes,

        [string]$ClusterName,

        [string]$ServiceName
    )
    $type = 'CREATE'
    if ($Exists) {
        $type = 'UPDATE'
    }
    if (-not $PSCmdlet.ShouldProcess("stack $StackName", "deploy ecs-template.yaml ($type)")) {
        foreach ($one in $Parameter) {
            Write-Step -Message "  $($one.Name) = $($one.Value)"
        }
        return 'Skipped'
    }
    $token = Get-RequestToken
    $changeSet = Add-ChangeSet -StackName $StackName -Name $token -Type $type -TemplatePath $TemplatePath -Parameter $Parameter
    if (-not $changeSet) {
        Write-Step -Message '  nothing to change'
        return 'Unchanged'
    }
    foreach ($change in $changeSet.Changes) {
        $resource = $change.ResourceChange
        Write-Step -Message "  will $($resource.Action) $($resource.LogicalResourceId) ($($resource.ResourceType))"
    }
    $arguments = 'cloudformation', 'execute-change-set', '--change-set-name', $changeSet.ChangeSetId, '--client-request-token', $token
    $null = Invoke-AwsCli -ArgumentList $arguments
    $wait = @{ StackId = $changeSet.StackId; Token = $token; TimeoutMinutes = $TimeoutMinutes; ClusterName = $ClusterName; ServiceName = $ServiceName }
    $end = Wait-StackOperation @wait
    if ('CREATE_COMPLETE', 'UPDATE_COMPLETE' -notcontains $end.Status) {
        $reasons = @($end.Failures | Select-Object -First 5) -join '; '
        throw "The stack '$StackName' ended as $($end.Status): $reasons. Remove the cause and run this script again."
    }
    'Changed'
}

# --- The image ------------------------------------------------------------------------------------

function Get-ContentHash {
    <#
    .SYNOPSIS
    Returns 12 hexadecimal digits that stand for the names and content of some files.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$Root,

        [Parameter(Mandatory = $true)]
        [string[]]$Name
    )
    $lines = foreach ($one in $Name) {
        $hash = Get-FileHash -LiteralPath (Join-Path -Path $Root -ChildPath $one) -Algorithm SHA256
        "$one $($hash.Hash)"
    }
    $sha = [System.Security.Cryptography.SHA256]::Create()
    try {
        $digest = $sha.ComputeHash([System.Text.Encoding]::UTF8.GetBytes($lines -join ' '))
    }
    finally {
        $sha.Dispose()
    }
    [BitConverter]::ToString($digest).Replace('-', '').Substring(0, 12).ToLowerInvariant()
}

function Get-ImageTag {
    <#
    .SYNOPSIS
    Returns the tag of the image that the files here make: REVISION-ARCH when they are those of the
    git revision, REVISION-dirty-HASH-ARCH when not, content-HASH-ARCH outside of git.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$Root,

        [Parameter(Mandatory = $true)]
        [string]$Platform
    )
    $architecture = ($Platform -split '/')[1]
    $names = 'Dockerfile', '.dockerignore', 'requirements.txt', 'server.py'
    $inputs = @($names | Where-Object { Test-Path -LiteralPath (Join-Path -Path $Root -ChildPath $_) })
    $version = 'content-' + (Get-ContentHash -Root $Root -Name $inputs)
    if (Get-Command -Name 'git' -ErrorAction SilentlyContinue) {
        $head = Invoke-Native -Command 'git' -ArgumentList '-C', $Root, 'rev-parse', '--short=12', 'HEAD'
        if ($head.ExitCode -eq 0) {
            $revision = $head.Output[0].Trim()
            $changes = Invoke-Native -Command 'git' -ArgumentList (@('-C', $Root, 'status', '--porcelain', '--') + $inputs)
            if ($changes.ExitCode -eq 0 -and $changes.Output.Count -eq 0) {
                $version = $revision
            }
            else {
                $version = $version.Replace('content', "$revision-dirty")
            }
        }
    }
    "$version-$architecture"
}

function Get-ImageDigest {
    <#
    .SYNOPSIS
    Returns the digest a tag stands for in the repository, or nothing when it is not there.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$RepositoryUri,

        [Parameter(Mandatory = $true)]
        [string]$Tag
    )
    $name = $RepositoryUri.Substring($RepositoryUri.IndexOf('/') + 1)
    $arguments = 'ecr', 'describe-images', '--repository-name', $name, '--image-ids', "imageTag=$Tag"
    $answer = Invoke-AwsCli -ArgumentList $arguments -AbsentPattern 'ImageNotFoundException'
    if ($answer) {
        $answer.imageDetails[0].imageDigest
    }
}

function Invoke-Docker {
    <#
    .SYNOPSIS
    Runs docker and shows what it says; throws with Advice and its last lines when it fails.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string[]]$ArgumentList,

        [string]$InputText,

        [Parameter(Mandatory = $true)]
        [string]$Advice
    )
    $result = Invoke-Native -Command 'docker' -ArgumentList $ArgumentList -InputText $InputText -Show
    if ($result.ExitCode -ne 0) {
        $tail = @($result.Output + $result.ErrorOutput | Where-Object { $_ } | Select-Object -Last 5) -join ' '
        throw "docker $($ArgumentList[0]) failed (exit code $($result.ExitCode)). $Advice Docker said: $tail"
    }
}

function Publish-Image {
    <#
    .SYNOPSIS
    Builds the image for a platform and pushes it to the repository under the tag.
    #>
    [CmdletBinding(SupportsShouldProcess = $true)]
    param(
        [Parameter(Mandatory = $true)]
        [string]$Root,

        [Parameter(Mandatory = $true)]
        [string]$RepositoryUri,

        [Parameter(Mandatory = $true)]
        [string]$Tag,

        [Parameter(Mandatory = $true)]
        [string]$Platform
    )
    $image = '{0}:{1}' -f $RepositoryUri, $Tag
    if (-not $PSCmdlet.ShouldProcess($image, "build for $Platform and push")) {
        return
    }
    $build = @(
        'build', '--platform', $Platform, '--label', "org.opencontainers.image.revision=$Tag",
        '--tag', $image, '--file', (Join-Path -Path $Root -ChildPath 'Dockerfile'), $Root
    )
    $advice = "If it cannot run programs for $Platform, add emulation ('docker run --privileged --rm tonistiigi/binfmt --install all') or choose the other -CpuArchitecture."
    Invoke-Docker -ArgumentList $build -Advice $advice

    $login = Invoke-Native -Command 'aws' -ArgumentList 'ecr', 'get-login-password'
    if ($login.ExitCode -ne 0) {
        throw "aws ecr get-login-password failed (exit code $($login.ExitCode)): $($login.ErrorOutput -join ' ')"
    }
    $registry = ($RepositoryUri -split '/')[0]
    $password = ($login.Output -join '').Trim()
    $advice = 'Docker could not keep the login; look at credsStore in its config.json.'
    Invoke-Docker -ArgumentList 'login', '--username', 'AWS', '--password-stdin', $registry -InputText $password -Advice $advice
    Invoke-Docker -ArgumentList 'push', $image -Advice 'Run this script again to go on from here.'
}

# --- The service ----------------------------------------------------------------------------------

function Wait-Service {
    <#
    .SYNOPSIS
    Waits until the service runs all its tasks and its rollout is complete, showing its progress.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$ClusterName,

        [Parameter(Mandatory = $true)]
        [string]$ServiceName,

        [Parameter(Mandatory = $true)]
        [int]$TimeoutMinutes
    )
    $deadline = [datetime]::UtcNow.AddMinutes($TimeoutMinutes)
    $shown = ''
    while ($true) {
        $service = Get-EcsService -ClusterName $ClusterName -ServiceName $ServiceName
        if (-not $service) {
            throw "The service $ServiceName is not in the cluster $ClusterName. Run this script again to have it made anew."
        }
        $state = Get-ServiceState -Service $service
        if ($state.Text -ne $shown) {
            $shown = $state.Text
            Write-Step -Message "  service: $shown"
        }
        if ($state.Stable) {
            return
        }
        if ($state.Failed) {
            throw "The rollout failed: $($service.events[0].message)"
        }
        if ([datetime]::UtcNow -ge $deadline) {
            throw "The service is not stable after $TimeoutMinutes minutes ($shown): $($service.events[0].message)"
        }
        Start-Sleep -Seconds 5
    }
}

function Get-StoppedTask {
    <#
    .SYNOPSIS
    Returns the two tasks that stopped last for any other reason than scaling and replacement.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$ClusterName
    )
    $arguments = 'ecs', 'list-tasks', '--cluster', $ClusterName, '--desired-status', 'STOPPED'
    $answer = Invoke-AwsCli -ArgumentList $arguments -AbsentPattern 'ClusterNotFoundException'
    $arns = @($answer.taskArns | Where-Object { $_ } | Select-Object -First 100)
    if ($arns.Count -eq 0) {
        return
    }
    $tasks = (Invoke-AwsCli -ArgumentList (@('ecs', 'describe-tasks', '--cluster', $ClusterName, '--tasks') + $arns)).tasks
    $failed = @($tasks | Where-Object { $_ -and $_.stoppedReason -notlike 'Scaling activity initiated by*' })
    $failed | Sort-Object -Property stoppedAt -Descending | Select-Object -First 2
}

function Get-TaskLog {
    <#
    .SYNOPSIS
    Returns the last lines a task's container logged.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [object]$Task
    )
    $arguments = 'ecs', 'describe-task-definition', '--task-definition', $Task.taskDefinitionArn
    $container = (Invoke-AwsCli -ArgumentList $arguments).taskDefinition.containerDefinitions[0]
    $options = $container.logConfiguration.options
    $stream = '{0}/{1}/{2}' -f $options.'awslogs-stream-prefix', $container.name, ($Task.taskArn -split '/')[-1]
    $arguments = 'logs', 'get-log-events', '--log-group-name', $options.'awslogs-group', '--log-stream-name', $stream, '--limit', '20'
    $answer = Invoke-AwsCli -ArgumentList $arguments -AbsentPattern 'ResourceNotFoundException'
    $answer.events | Where-Object { $_ } | ForEach-Object { $_.message }
}

function Show-RolloutFailure {
    <#
    .SYNOPSIS
    Shows what ECS says, why tasks stopped, their exit codes and last log lines. Never throws: the
    error that led here matters more.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$ClusterName,

        [Parameter(Mandatory = $true)]
        [string]$ServiceName
    )
    try {
        $service = Get-EcsService -ClusterName $ClusterName -ServiceName $ServiceName
        foreach ($said in @($service.events | Where-Object { $_ } | Select-Object -First 3)) {
            Write-Step -Message "ECS: $($said.message)"
        }
        foreach ($task in @(Get-StoppedTask -ClusterName $ClusterName)) {
            Write-Step -Message "Task $(($task.taskArn -split '/')[-1]) stopped: $($task.stoppedReason)"
            foreach ($container in $task.containers) {
                Write-Step -Message "  container $($container.name): exit code $($container.exitCode) $($container.reason)"
            }
            foreach ($line in @(Get-TaskLog -Task $task)) {
                Write-Step -Message "  log: $line"
            }
        }
    }
    catch {
        Write-Step -Message "  Why the tasks stopped could not be read: $($_.Exception.Message)"
    }
}

function Test-DnsRecord {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$HostName
    )
    try {
        $null = [System.Net.Dns]::GetHostAddresses($HostName)
        $true
    }
    catch {
        $false
    }
}

function Test-Deployment {
    <#
    .SYNOPSIS
    Runs test-connection.ps1 against the stack and throws when a check fails.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Test
    )
    & (Join-Path -Path $PSScriptRoot -ChildPath 'test-connection.ps1') @Test
    if ($LASTEXITCODE -ne 0) {
        throw 'The service is deployed, but not every check passed: see the table above for the next step.'
    }
}

# --- The deployment -------------------------------------------------------------------------------

function Get-StackState {
    <#
    .SYNOPSIS
    Returns whether the stack Exists, its Parameter values and its Output values, as a hashtable.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$StackName
    )
    $stack = Get-Stack -StackName $StackName
    if ($stack.StackStatus -eq 'REVIEW_IN_PROGRESS') {
        $stack = $null  # a change set was made and never executed: there is nothing yet
    }
    @{
        Exists    = [bool]$stack
        Parameter = Get-StackValue -Stack $stack -Kind Parameter
        Output    = Get-StackValue -Stack $stack -Kind Output
    }
}

function Get-GivenParameter {
    <#
    .SYNOPSIS
    Returns the template parameters that this run sets; the others keep their values.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Request,

        [Parameter(Mandatory = $true)]
        [hashtable]$MainOutput,

        [Parameter(Mandatory = $true)]
        [AllowEmptyCollection()]
        [hashtable]$Previous,

        [Parameter(Mandatory = $true)]
        [hashtable]$Template
    )
    $given = @{ Environment = $Request['Environment'] }
    foreach ($name in $MainOutput.Keys) {
        $given[$name] = $MainOutput[$name]
    }
    # A stack stays where it is unless it is told to move: what is found may change with the VPC.
    $sameVpc = -not $Request['VpcId'] -or $Request['VpcId'] -eq $Previous['VpcId']
    if (-not $Previous['VpcId'] -or -not $sameVpc -or $Request['LoadBalancerSubnetId'] -or $Request['TaskSubnetId']) {
        $place = @{
            VpcId                = $Request['VpcId']
            LoadBalancerSubnetId = $Request['LoadBalancerSubnetId']
            TaskSubnetId         = $Request['TaskSubnetId']
            AwsRegion            = $Request['AwsRegion']
        }
        $network = Get-NetworkParameter @place
        foreach ($name in $network.Keys) {
            $given[$name] = $network[$name]
        }
    }
    $override = Resolve-Override -Override $Request['Override'] -Template $Template
    foreach ($name in $override.Keys) {
        $given[$name] = $override[$name]
    }
    $values = @{ Given = $given; Previous = $Previous; Template = $Template }
    $certificate = Get-EffectiveValue -Name 'CertificateArn' @values
    if ($certificate -and ($certificate -split ':')[3] -ne $Request['AwsRegion']) {
        throw "The certificate belongs to $(($certificate -split ':')[3]). The load balancer in $($Request['AwsRegion']) needs one of its own region."
    }
    if ($certificate -and -not (Get-EffectiveValue -Name 'DomainName' @values)) {
        $given['DomainName'] = Get-CertificateDomain -CertificateArn $certificate
        Write-Step -Message "  clients connect to the certificate's name, $($given['DomainName'])"
    }
    $given
}

function Get-ContainerImage {
    <#
    .SYNOPSIS
    Returns the image by digest, from the repository if it is there, built and pushed if not.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [string]$RepositoryUri,

        [Parameter(Mandatory = $true)]
        [ValidateSet('X86_64', 'ARM64')]
        [string]$CpuArchitecture
    )
    $platforms = @{ X86_64 = 'linux/amd64'; ARM64 = 'linux/arm64' }
    $platform = $platforms[$CpuArchitecture]
    $tag = Get-ImageTag -Root $PSScriptRoot -Platform $platform
    $digest = $null
    if ($RepositoryUri -ne 'NEW_REPOSITORY') {
        $digest = Get-ImageDigest -RepositoryUri $RepositoryUri -Tag $tag
    }
    if ($tag -like '*-dirty-*') {
        Write-Step -Message '  the work tree differs from its revision, and the tag says so'
    }
    if ($digest) {
        Write-Step -Message "  $tag was pushed before and is used again"
        return '{0}@{1}' -f $RepositoryUri, $digest
    }
    Publish-Image -Root $PSScriptRoot -RepositoryUri $RepositoryUri -Tag $tag -Platform $platform
    if ($WhatIfPreference) {
        return '{0}:{1}' -f $RepositoryUri, $tag
    }
    $digest = Get-ImageDigest -RepositoryUri $RepositoryUri -Tag $tag
    if (-not $digest) {
        throw "The image $tag is not in $RepositoryUri. Run this script again to push it."
    }
    '{0}@{1}' -f $RepositoryUri, $digest
}

function Show-Summary {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Output,

        [Parameter(Mandatory = $true)]
        [hashtable]$Request
    )
    $place = "-StackName $($Request['StackName']) -AwsRegion $($Request['AwsRegion'])"
    $group = "/ecs/agenticai-websocket-$($Request['Environment'])"
    Write-Step -Message ''
    Write-Step -Message "Endpoint       $($Output['WebSocketEndpoint'])"
    Write-Step -Message "Updates queue  $($Output['UpdatesQueueUrl'])"
    Write-Step -Message "Dashboard      $($Output['DashboardUrl'])"
    Write-Step -Message ''
    Write-Step -Message 'Next:'
    Write-Step -Message "  check it      ./test-connection.ps1 $place"
    Write-Step -Message "  talk to it    python test-websocket.py $($Output['WebSocketEndpoint'])"
    Write-Step -Message "  read its log  aws logs tail $group --follow --region $($Request['AwsRegion'])  (AWS CLI 2)"
    Write-Step -Message '  update it     run this script again; template parameters keep their values'
}

function Publish-Foundation {
    <#
    .SYNOPSIS
    Deploys everything but the service, which needs an image, which needs the repository. Returns
    the stack's new state, or nothing when the operator refused.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Deploy,

        [Parameter(Mandatory = $true)]
        [hashtable]$State,

        [Parameter(Mandatory = $true)]
        [hashtable]$Given,

        [Parameter(Mandatory = $true)]
        [hashtable]$Template
    )
    $withoutImage = $Given.Clone()
    $withoutImage['ContainerImage'] = ''
    $parameters = @(Merge-StackParameter -Given $withoutImage -Previous $State['Parameter'] -Template $Template)
    $outcome = Publish-Stack -Exists $State['Exists'] -Parameter $parameters @Deploy
    if ($outcome -ne 'Skipped') {
        return Get-StackState -StackName $Deploy['StackName']
    }
    if ($WhatIfPreference) {
        # What the rest of -WhatIf needs to go on with.
        return @{ Exists = $true; Parameter = $State['Parameter']; Output = @{ WebSocketRepositoryUri = 'NEW_REPOSITORY' } }
    }
}

function Publish-Service {
    <#
    .SYNOPSIS
    Deploys the stack with the image and waits until the service is stable. Returns what
    Publish-Stack does; a failed rollout is explained before it throws.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Deploy,

        [Parameter(Mandatory = $true)]
        [hashtable]$State,

        [Parameter(Mandatory = $true)]
        [object[]]$Parameter,

        [Parameter(Mandatory = $true)]
        [string]$ServiceName
    )
    $cluster = [string]$State['Output']['ECSClusterName']
    try {
        $outcome = Publish-Stack -Exists $State['Exists'] -Parameter $Parameter -ClusterName $cluster -ServiceName $ServiceName @Deploy
        if ($outcome -ne 'Skipped') {
            Wait-Service -ClusterName $cluster -ServiceName $ServiceName -TimeoutMinutes $Deploy['TimeoutMinutes']
        }
        $outcome
    }
    catch {
        Show-RolloutFailure -ClusterName $cluster -ServiceName $ServiceName
        throw
    }
}

function Complete-Deployment {
    <#
    .SYNOPSIS
    Tests what was deployed and shows its addresses and the next commands.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Request,

        [Parameter(Mandatory = $true)]
        [hashtable]$Test
    )
    $state = Get-StackState -StackName $Request['StackName']
    $outputs = $state['Output']
    $endpoint = [uri]$outputs['WebSocketEndpoint']
    $ownRecord = $endpoint.Host -ne $outputs['LoadBalancerDNS'] -and -not $state['Parameter']['HostedZoneId']
    if ($ownRecord -and -not (Test-DnsRecord -HostName $endpoint.Host)) {
        Write-Step -Message "  $($endpoint.Host) does not resolve yet: make it a CNAME of $($outputs['LoadBalancerDNS'])."
        $Test['Check'] = @('Service', 'Targets', 'Logs')
    }
    Test-Deployment -Test $Test
    Show-Summary -Output $outputs -Request $Request
}

function Invoke-Deployment {
    <#
    .SYNOPSIS
    Does everything the script's help says, in that order.
    #>
    [CmdletBinding()]
    param(
        [Parameter(Mandatory = $true)]
        [hashtable]$Request,

        [Parameter(Mandatory = $true)]
        [hashtable]$Test
    )
    $stackName = $Request['StackName']
    $deploy = @{
        StackName      = $stackName
        TemplatePath   = Join-Path -Path $PSScriptRoot -ChildPath 'ecs-template.yaml'
        TimeoutMinutes = $Request['TimeoutMinutes']
    }
    if ($stackName -eq $Request['MainStackName']) {
        throw "-StackName and -MainStackName are both '$stackName'. The gateway needs a stack of its own."
    }

    Write-Step -Message 'Checking tools and credentials'
    Assert-Tool -Advice @{
        aws    = 'Install the AWS CLI, version 2, and open a new terminal.'
        docker = 'Install Docker Desktop (on Linux: Docker Engine) and open a new terminal.'
    }
    Assert-DockerEngine
    $account = Assert-Credential
    Write-Step -Message "  account $account, region $($Request['AwsRegion'])"

    Write-Step -Message "Reading the stacks $($Request['MainStackName']) and $stackName"
    $main = Get-MainStackOutput -MainStackName $Request['MainStackName']
    $template = Get-TemplateParameter -TemplatePath $deploy['TemplatePath']
    $stack = Wait-StackIdle -StackName $stackName -TimeoutMinutes $deploy['TimeoutMinutes']
    if ($stack) {
        Assert-GatewayStack -Stack $stack -Environment $Request['Environment']
        $null = Repair-Stack -Stack $stack -TimeoutMinutes $deploy['TimeoutMinutes']
    }
    $state = Get-StackState -StackName $stackName
    $given = Get-GivenParameter -Request $Request -MainOutput $main -Previous $state['Parameter'] -Template $template

    if (-not $state['Output']['WebSocketRepositoryUri']) {
        Write-Step -Message 'Deploying everything but the service'
        $state = Publish-Foundation -Deploy $deploy -State $state -Given $given -Template $template
        if (-not $state) {
            return
        }
    }

    Write-Step -Message 'Preparing the image'
    $values = @{ Given = $given; Previous = $state['Parameter']; Template = $template }
    $architecture = Get-EffectiveValue -Name 'CpuArchitecture' @values
    $given['ContainerImage'] = Get-ContainerImage -RepositoryUri $state['Output']['WebSocketRepositoryUri'] -CpuArchitecture $architecture

    Write-Step -Message "Deploying $($given['ContainerImage'])"
    $parameters = @(Merge-StackParameter @values)
    $service = "agenticai-websocket-$($Request['Environment'])"
    $outcome = Publish-Service -Deploy $deploy -State $state -Parameter $parameters -ServiceName $service
    if ($outcome -eq 'Skipped') {
        Write-Step -Message 'Nothing was deployed.'
        return
    }

    Write-Step -Message 'Testing'
    Complete-Deployment -Request $Request -Test $Test
}

# Dot-sourced, as the tests do it, the script only defines its functions.
if ($MyInvocation.InvocationName -ne '.') {
    $override = $ParameterOverride.Clone()
    foreach ($name in 'CertificateArn', 'DomainName', 'HostedZoneId', 'CpuArchitecture') {
        if ($PSBoundParameters.ContainsKey($name)) {
            $override[$name] = $PSBoundParameters[$name]
        }
    }
    $request = @{
        Environment          = $Environment
        AwsRegion            = $AwsRegion
        StackName            = $StackName
        MainStackName        = $MainStackName
        VpcId                = $VpcId
        LoadBalancerSubnetId = $LoadBalancerSubnetId
        TaskSubnetId         = $TaskSubnetId
        Override             = $override
        TimeoutMinutes       = $TimeoutMinutes
    }
    # Targets and DNS need a while after the first deployment.
    $test = @{ StackName = $StackName; AwsRegion = $AwsRegion; AccessToken = $AccessToken; WaitSeconds = 300 }
    $variables = Get-AwsEnvironment -AwsRegion $AwsRegion -AwsProfile $AwsProfile
    if ($AwsProfile) {
        $test['AwsProfile'] = $AwsProfile
    }
    # Plain images: attestations would come as entries of their own that ECR cannot scan or expire.
    $variables['BUILDX_NO_DEFAULT_ATTESTATIONS'] = '1'
    $environmentBefore = Push-Environment -Value $variables
    try {
        Invoke-Deployment -Request $request -Test $test
    }
    catch {
        $Host.UI.WriteErrorLine("deploy-ecs: $($_.Exception.Message)")
        Write-Verbose -Message $_.ScriptStackTrace
        exit 1
    }
    finally {
        Pop-Environment -Previous $environmentBefore
    }
    exit 0
}
