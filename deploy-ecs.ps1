<#
.SYNOPSIS
Deploys the WebSocket gateway to ECS Fargate with one command, and checks that it works.

.DESCRIPTION
In seven steps: checks its tools and credentials; reads what the platform's main stack exports and
how the gateway's stack stands; works out every parameter and says whether authentication, TLS and
the origin check are on; deploys ecs-template.yaml without an image, if the stack is new; builds the
image and pushes it under the git revision; deploys it by digest and waits until the service is
stable; tests the result with test-connection.ps1.

It may be run again at any time. A second run with nothing changed changes nothing. Template
parameters that are not given keep the values they have, also those of a first deployment that
failed; each such value is shown with where it comes from. A stack that never stood is made anew, a
stuck rollback is finished, an operation under way is waited for, an image pushed before is used
again. What another person has left waiting to be executed is shown, and not executed. A failed
rollout is rolled back, its reason and the last log lines are shown, and the exit code is 1.

The image's tag is the git revision and the processor, such as 3f2a9c1b7d10-amd64. When the files
that go into the image differ from that revision, a hash of their content is part of the tag.

Needs the AWS CLI (version 1 or 2), signed in, and Docker with Linux containers. Runs on Windows
PowerShell 5.1 and PowerShell 7. With -WhatIf it reads, and says what it would do, without Docker.

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
    # Name of the environment; part of the names of the cluster, the service and everything else.
    [ValidatePattern('(?-i)^[a-z][a-z0-9]{0,11}$')]
    [string]$Environment = 'prod',
    # Region to deploy to.
    [ValidatePattern('(?-i)^[a-z]{2}(-[a-z]+)+-\d$')]
    [string]$AwsRegion = 'us-east-1',
    # Profile of the AWS CLI to use, also where there are keys in the environment.
    [ValidateNotNullOrEmpty()]
    [string]$AwsProfile,
    # CloudFormation stack of the gateway. Each environment needs its own.
    [ValidatePattern('^[A-Za-z][A-Za-z0-9-]{0,127}$')]
    [string]$StackName = 'agenticai-websocket-stack',
    # CloudFormation stack of the platform, whose outputs name the table and the agents' queues.
    [ValidatePattern('^[A-Za-z][A-Za-z0-9-]{0,127}$')]
    [string]$MainStackName = 'agenticai-stack',
    # ACM certificate for wss:// on port 443. An empty string takes TLS away again.
    [ValidatePattern('^(arn:aws[a-z-]*:acm:[a-z0-9-]+:\d{12}:certificate/[A-Za-z0-9-]+)?$')]
    [string]$CertificateArn,
    # Name the clients connect to. The default is the certificate's own name.
    [ValidatePattern('^([A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+)?$')]
    [string]$DomainName,
    # Route 53 zone to keep the domain's record in. Without it you keep the record yourself.
    [ValidatePattern('(?-i)^(Z[A-Z0-9]{1,31})?$')]
    [string]$HostedZoneId,
    # Processor of the tasks, X86_64 or ARM64; the image is built for it.
    [ValidateSet('X86_64', 'ARM64')]
    [string]$CpuArchitecture,
    # VPC to deploy to. The default is the region's default VPC, or the only one there is.
    [ValidatePattern('^vpc-[0-9a-f]+$')]
    [string]$VpcId,
    # Public subnets of the load balancer, in two zones or more. Needs VpcId. Found unless given.
    [ValidatePattern('^subnet-[0-9a-f]+$')]
    [string[]]$LoadBalancerSubnetId,
    # Subnets of the tasks, in the same zones. Needs VpcId. The default is private subnets with a
    # NAT route where there are two, and otherwise the load balancer's.
    [ValidatePattern('^subnet-[0-9a-f]+$')]
    [string[]]$TaskSubnetId,
    # Any further parameters of ecs-template.yaml, such as @{ MaxTasks = 8; LogLevel = 'DEBUG' }.
    [ValidateNotNull()]
    [hashtable]$ParameterOverride = @{},
    # Token for the final round trip; $env:AGENTICAI_TOKEN unless given.
    [string]$AccessToken = $env:AGENTICAI_TOKEN,
    # Build the image anew on the newest base image, although this revision's image was pushed
    # before. Later runs on the same revision use the newest.
    [switch]$Rebuild,
    # How long to wait for each stack operation, which ends when the service is stable.
    [ValidateRange(5, 180)]
    [int]$TimeoutMinutes = 30
)

. (Join-Path -Path $PSScriptRoot -ChildPath 'ecs-common.ps1')

# --- What is there: read only ---------------------------------------------------------------------

# Throws unless Docker's engine answers and runs Linux containers.
function Assert-DockerEngine {
    [CmdletBinding()] param()
    $result = Invoke-Native -Command 'docker' -ArgumentList 'version', '--format', '{{.Server.Os}}'
    if ($result.ExitCode -ne 0) {
        $problem = ($result.ErrorOutput -join ' ').Trim()
        throw "Docker's engine does not answer. Start Docker Desktop (on Linux: sudo systemctl start docker). Docker said: $problem"
    }
    if (($result.Output -join '').Trim() -eq 'windows') {
        throw 'Docker runs Windows containers here. Choose "Switch to Linux containers" in the menu of Docker Desktop.'
    }
}

# Returns the main stack's outputs that the template's parameters of the same names take, as a
# hashtable; throws naming every one that is missing.
function Get-MainStackOutput {
    [CmdletBinding()] param()
    $required = 'DataTableName', 'PMQueueUrl', 'DevQueueUrl', 'QAQueueUrl', 'OpsQueueUrl'
    $stack = Get-Stack -Name $MainStackName
    if (-not $stack) {
        throw "The platform's main stack '$MainStackName' does not exist in this account and region. Deploy it first, or name it with -MainStackName (and -AwsRegion)."
    }
    $missing = @($required | Where-Object { -not $stack.Output[$_] })
    if ($missing.Count -gt 0) {
        throw "The main stack '$MainStackName' ($($stack.Status)) lacks these outputs: $($missing -join ', '). Add them to its template and update it, or name another stack with -MainStackName."
    }
    $values = @{}
    foreach ($name in $required) {
        $values[$name] = $stack.Output[$name]
    }
    $values
}

# Throws when the stack was made from another template or for another environment, or cannot be
# brought into order from here.
function Assert-GatewayStack {
    [CmdletBinding()] param([object]$Stack)
    $parameters = $Stack.Parameter
    if (-not $parameters.ContainsKey('ContainerImage') -or -not $parameters['Environment']) {
        throw "The stack '$StackName' was not made from ecs-template.yaml, and updating it would delete what is in it. Choose another -StackName."
    }
    if ($parameters['Environment'] -ne $Environment) {
        throw "The stack '$StackName' is the environment '$($parameters['Environment'])'. Say -Environment $($parameters['Environment']) to update it, or choose another -StackName for '$Environment'."
    }
    if ($Stack.Status -eq 'DELETE_FAILED') {
        throw "Deleting the stack '$StackName' failed ($($Stack.Reason)). Finish that first: aws cloudformation delete-stack --stack-name $StackName --region $AwsRegion"
    }
}

# Waits until no operation is under way and returns the stack, or nothing when there is none.
function Wait-StackIdle {
    [CmdletBinding()] param()
    $deadline = [datetime]::UtcNow.AddMinutes($TimeoutMinutes)
    $shown = ''
    while ($true) {
        $stack = Get-Stack -Name $StackName
        if (-not $stack -or $stack.Status -eq 'REVIEW_IN_PROGRESS' -or $stack.Status -notlike '*_IN_PROGRESS') {
            return $stack
        }
        if ([datetime]::UtcNow -ge $deadline) {
            throw "The stack '$StackName' is still $($stack.Status) after $TimeoutMinutes minutes. Run this script again when it is done."
        }
        if ($stack.Status -ne $shown) {
            $shown = $stack.Status
            Write-Step -Message "  another operation is under way ($shown); waiting for its end"
        }
        Start-Sleep -Seconds 5
    }
}

# Throws, after showing its values, when a change set for a new stack waits for its execution.
# Whoever may make one could have planted a value in it: a person has to look.
function Assert-NothingWaiting {
    [CmdletBinding()] param([hashtable]$Template, [hashtable]$MainOutput)
    $arguments = 'cloudformation', 'list-change-sets', '--stack-name', $StackName, '--query', 'Summaries[].ChangeSetId'
    $waiting = @(Invoke-AwsCli -ArgumentList $arguments | Where-Object { $_ })
    if ($waiting.Count -eq 0) {
        return
    }
    $query = '{Name:ChangeSetName,Status:Status,Reason:StatusReason,Parameters:Parameters[].[ParameterKey,ParameterValue]}'
    $changeSet = Invoke-AwsCli -ArgumentList 'cloudformation', 'describe-change-set', '--change-set-name', $waiting[0], '--query', $query
    $values = ConvertTo-Table -Pair $changeSet.Parameters
    $given = @{}
    Write-Step -Message "  the change set $($changeSet.Name) ($($changeSet.Status)) waits for its execution, with these values:"
    foreach ($name in @($values.Keys | Sort-Object)) {
        $known = 'Environment', 'ContainerImage' -contains $name -or $MainOutput[$name] -eq $values[$name]
        if (-not $known -and $Template[$name] -ne $values[$name]) {
            Write-Step -Message "    $name = $($values[$name])"
            $given[$name] = $values[$name]
        }
    }
    Write-Step -Message '  If you know them all, delete it and deploy with them; if not, delete it and deploy with your own:'
    Write-Step -Message "    aws cloudformation delete-stack --stack-name $StackName --region $AwsRegion"
    Write-Step -Message "    $(Get-RepeatCommand -Override $given)"
    throw "A change set of the new stack '$StackName' was never executed, and it may be anybody's. Nothing was changed. $($changeSet.Reason)".Trim()
}

# Returns Stack and ByThisScript of the stack of this name that was deleted last; nothing when
# there is none. CloudFormation keeps it readable, by its id, for 90 days.
function Get-DeletedStack {
    [CmdletBinding()] param()
    $query = "StackSummaries[?StackName=='$StackName'].{Id:StackId,At:DeletionTime}"
    $arguments = 'cloudformation', 'list-stacks', '--stack-status-filter', 'DELETE_COMPLETE', '--query', $query
    $newest = Invoke-AwsCli -ArgumentList $arguments | Sort-Object -Property 'At' | Select-Object -Last 1
    if ($newest) {
        $deletions = @(Get-StackEvent -StackId $newest.Id | Where-Object { $_.Resource -eq $newest.Id -and $_.Status -eq 'DELETE_IN_PROGRESS' })
        [pscustomobject]@{
            Stack        = Get-Stack -Name $newest.Id
            ByThisScript = @($deletions | Where-Object { $_.Token -like 'deploy-*' }).Count -gt 0
        }
    }
}

function Get-StackEvent {
    [CmdletBinding()] param([string]$StackId)
    $query = 'StackEvents[].{Id:EventId,Token:ClientRequestToken,Status:ResourceStatus,Name:LogicalResourceId,Resource:PhysicalResourceId,Type:ResourceType,Reason:ResourceStatusReason,At:Timestamp}'
    Invoke-AwsCli -ArgumentList 'cloudformation', 'describe-stack-events', '--stack-name', $StackId, '--max-items', '100', '--query', $query
}

# Returns the template without comments and empty lines: CloudFormation takes 51,200 bytes.
function Get-TemplateBody {
    [CmdletBinding()] param()
    $text = [System.IO.File]::ReadAllText((Join-Path -Path $PSScriptRoot -ChildPath 'ecs-template.yaml')).Replace("$([char]13)", '')
    [regex]::Replace($text, '(?m)^\s*#.*\n|  +# .*$|^\n', '')
}

# Writes a text into the run's own folder and returns what names it on a command line of the AWS
# CLI. Windows PowerShell strips the quotes from JSON on a command line, and writes a byte order
# mark, which the AWS CLI cannot read, with its own cmdlets.
function New-CliFile {
    [CmdletBinding()] param([string]$Name, [string]$Text)
    $path = Join-Path -Path $RunFolder -ChildPath $Name
    [System.IO.File]::WriteAllText($path, $Text)
    "file://$path"
}

# Returns the template's parameters as a hashtable of name and default.
function Get-TemplateParameter {
    [CmdletBinding()] param()
    $arguments = 'cloudformation', 'get-template-summary', '--template-body', $TemplateBody
    $answer = Invoke-AwsCli -ArgumentList ($arguments + @('--query', '{Parameters:Parameters[].[ParameterKey,DefaultValue]}'))
    ConvertTo-Table -Pair $answer.Parameters
}

# --- The network ----------------------------------------------------------------------------------

# Returns the region's default VPC, or the only one there is; throws when there is a choice.
function Get-VpcId {
    [CmdletBinding()] param()
    $vpcs = @(Invoke-AwsCli -ArgumentList 'ec2', 'describe-vpcs', '--query', 'Vpcs[].{Id:VpcId,Default:IsDefault,Range:CidrBlock}')
    $default = @($vpcs | Where-Object { $_.Default })
    if ($default.Count -gt 0) {
        return $default[0].Id
    }
    if ($vpcs.Count -eq 1) {
        return $vpcs[0].Id
    }
    if ($vpcs.Count -eq 0) {
        throw "There is no VPC in this region. Make the default one with 'aws ec2 create-default-vpc', or name another region."
    }
    $names = @($vpcs | ForEach-Object { "$($_.Id) ($($_.Range))" })
    throw "There is no default VPC, but there are $($vpcs.Count) others. Say which one with -VpcId: $($names -join ', ')"
}

# Returns where a subnet's default route goes: Public (internet gateway), Nat, or None.
function Get-RouteKind {
    [CmdletBinding()] param([string]$SubnetId, [object[]]$RouteTable)
    $table = $RouteTable | Where-Object { $_.Subnets -contains $SubnetId } | Select-Object -First 1
    if (-not $table) {
        # A subnet without a table of its own follows the VPC's main one.
        $table = $RouteTable | Where-Object { $_.Main -contains $true } | Select-Object -First 1
    }
    $routes = @($table | ForEach-Object { $_.Routes } | Where-Object { $_ -and $_.State -eq 'active' })
    if (@($routes | Where-Object { $_.Gateway -like 'igw-*' }).Count -gt 0) {
        return 'Public'
    }
    if (@($routes | Where-Object { $_.Nat }).Count -gt 0) {
        return 'Nat'
    }
    'None'
}

# Returns Id, Zone and Kind (Public, Nat, None) of a VPC's subnets, sorted by zone and id.
function Get-VpcSubnet {
    [CmdletBinding()] param([string]$Vpc)
    $filter = "Name=vpc-id,Values=$Vpc"
    $query = 'Subnets[].{Id:SubnetId,Zone:AvailabilityZone,Outpost:OutpostArn}'
    $subnets = @(Invoke-AwsCli -ArgumentList 'ec2', 'describe-subnets', '--filters', $filter, '--query', $query)
    $query = "RouteTables[].{Subnets:Associations[].SubnetId,Main:Associations[].Main,Routes:Routes[?DestinationCidrBlock=='0.0.0.0/0'].{Gateway:GatewayId,Nat:NatGatewayId,State:State}}"
    $tables = @(Invoke-AwsCli -ArgumentList 'ec2', 'describe-route-tables', '--filters', $filter, '--query', $query)
    if ($subnets.Count -eq 0 -or $tables.Count -eq 0) {
        throw "The VPC $Vpc has no subnets in $AwsRegion. Name another one with -VpcId."
    }
    # Neither local zones nor outposts, whose names are longer: Fargate does not run there.
    $zonePattern = '^' + $AwsRegion + '[a-z]$'
    foreach ($subnet in ($subnets | Sort-Object -Property 'Zone', 'Id')) {
        if ($subnet.Zone -match $zonePattern -and -not $subnet.Outpost) {
            $kind = Get-RouteKind -SubnetId $subnet.Id -RouteTable $tables
            [pscustomobject]@{ Id = $subnet.Id; Zone = $subnet.Zone; Kind = $kind }
        }
    }
}

# Chooses two zones with a public subnet each for the load balancer, and the tasks' subnets in the
# same zones: those with a NAT route where both zones have one, else the public ones.
function Select-Subnet {
    [CmdletBinding()] param([object[]]$Subnet)
    $first = @{ Public = @{}; Nat = @{}; None = @{} }
    foreach ($one in $Subnet) {
        if (-not $first[$one.Kind].ContainsKey($one.Zone)) {
            $first[$one.Kind][$one.Zone] = $one.Id
        }
    }
    $public = $first['Public']
    $nat = $first['Nat']
    $zones = @($public.Keys | Sort-Object)
    if ($zones.Count -lt 2) {
        throw "The load balancer needs public subnets in two zones, and there are $($zones.Count) (with a route to an internet gateway). Add one, name another VPC with -VpcId, or name subnets with -LoadBalancerSubnetId."
    }
    $chosen = $zones[0..1]
    $tasks = $public
    $publicAddress = 'ENABLED'
    $natZones = @($zones | Where-Object { $nat.ContainsKey($_) })
    if ($natZones.Count -ge 2) {
        $chosen = $natZones[0..1]
        $tasks = $nat
        $publicAddress = 'DISABLED'
    }
    @{
        LoadBalancerSubnetIds = @($chosen | ForEach-Object { $public[$_] }) -join ','
        TaskSubnetIds         = @($chosen | ForEach-Object { $tasks[$_] }) -join ','
        AssignPublicIp        = $publicAddress
    }
}

# Returns the template's four network parameters, from what was given and what is found.
function Get-NetworkParameter {
    [CmdletBinding()] param()
    $vpc = $VpcId
    if (-not $vpc) {
        if ($LoadBalancerSubnetId -or $TaskSubnetId) {
            throw '-LoadBalancerSubnetId and -TaskSubnetId need the -VpcId they belong to.'
        }
        $vpc = Get-VpcId
    }
    $subnets = @(Get-VpcSubnet -Vpc $vpc)
    $known = @($subnets | ForEach-Object { $_.Id })
    $foreign = @(@($LoadBalancerSubnetId) + @($TaskSubnetId) | Where-Object { $_ -and $known -notcontains $_ })
    if ($foreign.Count -gt 0) {
        throw "Not subnets of $vpc in a zone of $($AwsRegion): $($foreign -join ', ')"
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
    $network['VpcId'] = $vpc
    $network
}

# Returns the first name a certificate covers that is no wildcard.
function Get-CertificateDomain {
    [CmdletBinding()] param([string]$Arn)
    if (($Arn -split ':')[3] -ne $AwsRegion) {
        throw "The certificate belongs to $(($Arn -split ':')[3]). The load balancer in $AwsRegion needs one of its own region."
    }
    $query = 'Certificate.{Status:Status,Name:DomainName,Names:SubjectAlternativeNames}'
    $certificate = Invoke-AwsCli -ArgumentList 'acm', 'describe-certificate', '--certificate-arn', $Arn, '--query', $query
    if ($certificate.Status -ne 'ISSUED') {
        throw "The certificate is $($certificate.Status), not ISSUED. Complete its validation in ACM first."
    }
    $names = @(@($certificate.Name) + @($certificate.Names) | Where-Object { $_ -and $_ -notlike '*[*]*' })
    if ($names.Count -eq 0) {
        throw "The certificate covers $($certificate.Name). Say with -DomainName which name the clients connect to."
    }
    $names[0]
}

# --- Parameters: what each is, and where it comes from --------------------------------------------

# Returns a value as CloudFormation wants it: lists with commas, booleans in lower case.
function ConvertTo-ParameterValue {
    [CmdletBinding()] param([AllowNull()][object]$Value)
    if ($Value -is [bool]) {
        return ([string]$Value).ToLowerInvariant()
    }
    if ($Value -is [array]) {
        return $Value -join ','
    }
    [string]$Value
}

# Returns the overrides under the template's own spelling, as strings; throws for unknown names.
function Resolve-Override {
    [CmdletBinding()] param([hashtable]$Override, [hashtable]$Template)
    $unknown = @($Override.Keys | Where-Object { -not $Template.ContainsKey($_) } | Sort-Object)
    if ($unknown.Count -gt 0) {
        throw "ecs-template.yaml has no parameter $($unknown -join ', '). Its parameters are: $(@($Template.Keys | Sort-Object) -join ', ')"
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

# Returns the values that the deployment before this one had been given, and Source, where they
# are: in the stack, in one whose creation failed, or in one that was deleted to be made anew.
function Get-Inheritance {
    [CmdletBinding()] param([AllowNull()][object]$Stack, [AllowNull()][object]$Deleted)
    $values = @{}
    $source = ''
    if ($Stack -and $Stack.Status -ne 'REVIEW_IN_PROGRESS') {
        $values = $Stack.Parameter
        $source = 'the stack'
        if (Test-NeverStood -Stack $Stack) {
            $source = "the stack whose creation failed ($($Stack.Status))"
        }
    }
    elseif ($Deleted -and $Deleted.ByThisScript) {
        $values = $Deleted.Stack.Parameter
        $source = 'the failed stack that was deleted to make it anew'
    }
    $kept = @{}
    foreach ($name in $values.Keys) {
        # What NoEcho hides is not the value; and an image of that time is not this one.
        if ($values[$name] -ne '****' -and $name -ne 'ContainerImage') {
            $kept[$name] = $values[$name]
        }
    }
    [pscustomobject]@{ Value = $kept; Source = $source }
}

function Test-NeverStood {
    [CmdletBinding()] param([object]$Stack)
    'ROLLBACK_COMPLETE', 'ROLLBACK_FAILED', 'CREATE_FAILED' -contains $Stack.Status
}

# Returns Value and Source of every template parameter, as a hashtable; those without a source
# have the template's default.
function Resolve-Parameter {
    [CmdletBinding()] param([hashtable]$Template, [hashtable]$MainOutput, [object]$Inherited)
    $override = $ParameterOverride.Clone()
    $own = @{ CertificateArn = $CertificateArn; DomainName = $DomainName; HostedZoneId = $HostedZoneId; CpuArchitecture = $CpuArchitecture }
    foreach ($name in $own.Keys) {
        if ($CalledWith.ContainsKey($name)) {
            $override[$name] = $own[$name]
        }
    }
    $sources = @{ $Inherited.Source = $Inherited.Value; 'the main stack' = $MainOutput; 'given' = (Resolve-Override -Override $override -Template $Template) }
    # A stack stays where it is unless it is told to move: what is found may change with the VPC.
    $sameVpc = -not $VpcId -or $VpcId -eq $Inherited.Value['VpcId']
    if (-not $Inherited.Value['VpcId'] -or -not $sameVpc -or $LoadBalancerSubnetId -or $TaskSubnetId) {
        $sources['found'] = Get-NetworkParameter
    }
    $sources['given']['Environment'] = $Environment
    $resolved = @{}
    foreach ($name in $Template.Keys) {
        $resolved[$name] = [pscustomobject]@{ Value = $Template[$name]; Source = '' }
        foreach ($source in $Inherited.Source, 'the main stack', 'found', 'given') {
            $known = $sources.ContainsKey($source) -and $sources[$source].ContainsKey($name)
            if ($known -and ($resolved[$name].Source -ne 'the stack' -or $resolved[$name].Value -ne $sources[$source][$name])) {
                $resolved[$name] = [pscustomobject]@{ Value = $sources[$source][$name]; Source = $source }
            }
        }
    }
    $certificate = $resolved['CertificateArn'].Value
    if ($certificate -and -not $resolved['DomainName'].Value) {
        $resolved['DomainName'] = [pscustomobject]@{ Value = Get-CertificateDomain -Arn $certificate; Source = 'the certificate' }
    }
    elseif ($certificate -and $resolved['CertificateArn'].Source -eq 'given') {
        $null = Get-CertificateDomain -Arn $certificate
    }
    $resolved
}

# Shows every value that is new, or comes from a deployment that failed, and where it comes from.
function Show-Parameter {
    [CmdletBinding()] param([hashtable]$Resolved, [hashtable]$Template)
    foreach ($name in @($Resolved.Keys | Sort-Object)) {
        $one = $Resolved[$name]
        if ($one.Source -and $one.Source -ne 'the stack' -and $one.Value -ne $Template[$name]) {
            Write-Step -Message "  $name = $($one.Value)  (from: $($one.Source))"
        }
    }
}

# Says whether authentication, TLS and the origin check are on, by the parameters' values.
function Show-Security {
    [CmdletBinding()] param([hashtable]$Value)
    $checks = @(
        @('authentication', 'AuthJwksUrl', "tokens of $($Value['AuthIssuer'])", 'everybody who reaches it may use every project'),
        @('TLS', 'CertificateArn', "as $($Value['DomainName'])", 'everything can be read on the way'),
        @('origin check', 'AllowedOrigins', $Value['AllowedOrigins'], 'pages of every origin may connect')
    )
    foreach ($check in $checks) {
        $text = "OFF: $($check[3])"
        if ($Value[$check[1]]) {
            $text = "on, $($check[2])"
        }
        Write-Step -Message ('  {0,-14}  {1}' -f $check[0], $text)
    }
}

# Returns a value as it is typed in PowerShell.
function ConvertTo-Argument {
    [CmdletBinding()] param([AllowNull()][object]$Value)
    if ($Value -is [hashtable]) {
        $entries = @($Value.Keys | Sort-Object | ForEach-Object { "$_ = $(ConvertTo-Argument -Value $Value[$_])" })
        return "@{ $($entries -join '; ') }"
    }
    if ($Value -is [array]) {
        return @($Value | ForEach-Object { ConvertTo-Argument -Value $_ }) -join ', '
    }
    if ($Value -is [bool] -or $Value -is [switch]) {
        return "`$$Value".ToLowerInvariant()
    }
    "'$(([string]$Value).Replace("'", "''"))'"
}

# Returns the command line that runs this script with the same arguments; or with others for the
# template's parameters.
function Get-RepeatCommand {
    [CmdletBinding()] param([hashtable]$Override)
    $words = @('./deploy-ecs.ps1')
    foreach ($name in @($CalledWith.Keys | Sort-Object)) {
        if ('AccessToken', 'WhatIf', 'Confirm', 'Verbose', 'Rebuild' -contains $name) {
            continue
        }
        # Those that are parameters of the template as well are among the others.
        $ofTemplate = 'CertificateArn', 'DomainName', 'HostedZoneId', 'CpuArchitecture', 'VpcId', 'LoadBalancerSubnetId', 'TaskSubnetId', 'ParameterOverride' -contains $name
        if (-not $Override -or -not $ofTemplate) {
            $words += "-$name $(ConvertTo-Argument -Value $CalledWith[$name])"
        }
    }
    if ($Override -and $Override.Count -gt 0) {
        $words += "-ParameterOverride $(ConvertTo-Argument -Value $Override)"
    }
    $words -join ' '
}

# --- The stack ------------------------------------------------------------------------------------

# Shows an operation's events, and the service's progress, until it has ended. Returns the stack's
# Status and the reasons of all Failures.
function Wait-StackOperation {
    [CmdletBinding()] param([string]$StackId, [string]$Token, [string]$ClusterName)
    $deadline = [datetime]::UtcNow.AddMinutes($TimeoutMinutes)
    $seen = @{}
    $failures = @()
    $progress = ''
    while ($true) {
        # The token tells this operation's events from earlier ones, the newest of which come first.
        $events = @(Get-StackEvent -StackId $StackId | Where-Object { $_.Token -eq $Token })
        [array]::Reverse($events)
        foreach ($one in @($events | Where-Object { -not $seen.ContainsKey($_.Id) })) {
            $seen[$one.Id] = $true
            $line = "$($one.Status) $($one.Name) $($one.Reason)".Trim()
            # What was cancelled failed only because something else did.
            if ($one.Status -like '*_FAILED' -and $one.Reason -notlike '*cancelled*') {
                $failures += $line
            }
            if ($one.Status -notlike '*_IN_PROGRESS') {
                Write-Step -Message "  $line"
                if ($one.Resource -eq $StackId) {
                    return [pscustomobject]@{ Status = $one.Status; Failures = $failures }
                }
            }
        }
        if ([datetime]::UtcNow -ge $deadline) {
            throw "The stack operation is not done after $TimeoutMinutes minutes and goes on in AWS. Run this script again: it waits for the end and goes on from there."
        }
        if ($ClusterName) {
            $state = Get-ServiceState -ClusterName $ClusterName -ServiceName $ServiceName
            if ($state -and $state.Text -ne $progress) {
                $progress = $state.Text
                Write-Step -Message "  service: $progress"
            }
        }
        Start-Sleep -Seconds 5
    }
}

# Brings a stack that an earlier failure left unusable into order. Returns whether there is one to
# update afterwards.
function Repair-Stack {
    [CmdletBinding()] param([object]$Stack)
    $verb = 'rollback-stack'
    $wanted = 'UPDATE_ROLLBACK_COMPLETE'
    if (Test-NeverStood -Stack $Stack) {
        $verb = 'delete-stack'
        $wanted = 'DELETE_COMPLETE'
    }
    elseif ($Stack.Status -eq 'UPDATE_ROLLBACK_FAILED') {
        $verb = 'continue-update-rollback'
    }
    elseif ($Stack.Status -ne 'UPDATE_FAILED') {
        return $true
    }
    Write-Step -Message "  the stack is $($Stack.Status): $verb"
    # The token is how a later run knows that it was this script, and not a person, that deleted it.
    $token = 'deploy-' + [guid]::NewGuid()
    $null = Invoke-AwsCli -ArgumentList 'cloudformation', $verb, '--stack-name', $Stack.Id, '--client-request-token', $token
    $end = Wait-StackOperation -StackId $Stack.Id -Token $token
    if ($end.Status -ne $wanted) {
        throw "The stack '$StackName' is $($end.Status): $($end.Failures -join '; '). Remove the cause named there and run this script again."
    }
    $wanted -ne 'DELETE_COMPLETE'
}

# Waits until SQS lets go of the names of the queues that a deleted stack had: 60 seconds.
function Wait-QueueName {
    [CmdletBinding()] param([string]$StackId)
    $gone = @(Get-StackEvent -StackId $StackId | Where-Object { $_.Type -eq 'AWS::SQS::Queue' -and $_.Status -eq 'DELETE_COMPLETE' })
    foreach ($one in $gone) {
        $left = [math]::Ceiling(([datetime]$one.At).ToUniversalTime().AddSeconds(61).Subtract([datetime]::UtcNow).TotalSeconds)
        if ($left -gt 0) {
            Write-Step -Message "  waiting $left seconds: the name of a queue that was deleted cannot be used again before"
            Start-Sleep -Seconds $left
        }
    }
}

# Asks CloudFormation what would change. Returns Id, StackId and Changes, or nothing when nothing
# would; throws with the reasons when it does not accept the change.
function New-ChangeSet {
    [CmdletBinding()] param([string]$Name, [bool]$Exists, [hashtable]$Resolved)
    $unchanged = 'No updates are to be performed|contain changes'
    $type = 'CREATE'
    if ($Exists) {
        $type = 'UPDATE'
    }
    # One by one, because Windows PowerShell writes some arrays as an object with a count.
    $entries = foreach ($key in @($Resolved.Keys | Where-Object { $Resolved[$_].Source } | Sort-Object)) {
        if ($Exists -and $Resolved[$key].Source -eq 'the stack') {
            ConvertTo-Json -Compress -InputObject @{ ParameterKey = $key; UsePreviousValue = $true }
        }
        else {
            ConvertTo-Json -Compress -InputObject @{ ParameterKey = $key; ParameterValue = [string]$Resolved[$key].Value }
        }
    }
    $parameters = New-CliFile -Name 'parameters.json' -Text ('[' + ($entries -join ',') + ']')
    $arguments = @(
        'cloudformation', 'create-change-set', '--stack-name', $StackName, '--change-set-name', $Name,
        '--change-set-type', $type, '--template-body', $TemplateBody,
        '--parameters', $parameters, '--capabilities', 'CAPABILITY_IAM', '--query', 'Id'
    )
    $id = Invoke-AwsCli -ArgumentList $arguments -AbsentPattern $unchanged
    if (-not $id) {
        return
    }
    $query = '{Id:ChangeSetId,StackId:StackId,Status:Status,Reason:StatusReason,Changes:Changes[].ResourceChange.{Action:Action,Name:LogicalResourceId,Type:ResourceType,Replacement:Replacement}}'
    $deadline = [datetime]::UtcNow.AddMinutes(10)
    $changeSet = $null
    while (-not $changeSet -or 'CREATE_PENDING', 'CREATE_IN_PROGRESS' -contains $changeSet.Status) {
        if ([datetime]::UtcNow -ge $deadline) {
            throw "CloudFormation has not worked out the changes to '$StackName' within 10 minutes. Run this script again."
        }
        if ($changeSet) {
            Start-Sleep -Seconds 2
        }
        $changeSet = Invoke-AwsCli -ArgumentList 'cloudformation', 'describe-change-set', '--change-set-name', $id, '--query', $query
    }
    if ($changeSet.Status -eq 'CREATE_COMPLETE') {
        return $changeSet
    }
    $reasons = ''
    if ($changeSet.Reason -notmatch $unchanged) {
        $reasons = "$($changeSet.Reason) $(Get-ValidationReason -ChangeSetId $id)".Trim()
    }
    # That of a new stack stays: it alone holds the values that were given.
    if ($Exists) {
        $null = Invoke-AwsCli -ArgumentList 'cloudformation', 'delete-change-set', '--change-set-name', $id
    }
    if ($reasons) {
        throw "CloudFormation does not accept the change to '$StackName': $reasons"
    }
}

# Returns why a change set failed early, in one line; an empty one where AWS does not say.
function Get-ValidationReason {
    [CmdletBinding()] param([string]$ChangeSetId)
    try {
        $query = 'OperationEvents[?ValidationStatusReason].{Name:LogicalResourceId,Why:ValidationStatusReason}'
        $events = @(Invoke-AwsCli -ArgumentList 'cloudformation', 'describe-events', '--change-set-name', $ChangeSetId, '--query', $query)
        @($events | ForEach-Object { "$($_.Name): $($_.Why)" }) -join '; '
    }
    catch {
        Write-Verbose -Message "An older AWS CLI does not know the operation: $($_.Exception.Message)"
        ''
    }
}

function Show-Change {
    [CmdletBinding()] param([AllowNull()][object]$ChangeSet)
    if (-not $ChangeSet) {
        Write-Step -Message '  nothing to change'
        return
    }
    foreach ($change in $ChangeSet.Changes) {
        $verb = $change.Action
        if ($change.Replacement -eq 'True') {
            $verb = 'REPLACE'
        }
        elseif ($change.Replacement -eq 'Conditional') {
            $verb = 'Modify, perhaps REPLACE,'
        }
        Write-Step -Message "  will $verb $($change.Name) ($($change.Type))"
    }
}

# Creates or updates the stack, which is done when its service is stable; throws with the reasons
# when the operation fails.
function Publish-Stack {
    [CmdletBinding()] param([bool]$Exists, [hashtable]$Resolved, [string]$ClusterName)
    $token = 'deploy-' + [guid]::NewGuid()
    $changeSet = New-ChangeSet -Name $token -Exists $Exists -Resolved $Resolved
    Show-Change -ChangeSet $changeSet
    if (-not $changeSet) {
        return
    }
    $null = Invoke-AwsCli -ArgumentList 'cloudformation', 'execute-change-set', '--change-set-name', $changeSet.Id, '--client-request-token', $token
    $end = Wait-StackOperation -StackId $changeSet.StackId -Token $token -ClusterName $ClusterName
    if ('CREATE_COMPLETE', 'UPDATE_COMPLETE' -notcontains $end.Status) {
        $reasons = @($end.Failures | Select-Object -First 5) -join '; '
        throw "The stack '$StackName' ended as $($end.Status): $reasons. Remove the cause and run this script again."
    }
}

# --- The image ------------------------------------------------------------------------------------

# Returns 12 hexadecimal digits that stand for the names and content of some files.
function Get-ContentHash {
    [CmdletBinding()] param([string]$Root, [string[]]$Name)
    $lines = foreach ($one in $Name) {
        "$one $((Get-FileHash -LiteralPath (Join-Path -Path $Root -ChildPath $one) -Algorithm SHA256).Hash)"
    }
    $stream = [System.IO.MemoryStream]::new([System.Text.Encoding]::UTF8.GetBytes($lines -join ' '))
    (Get-FileHash -InputStream $stream -Algorithm SHA256).Hash.Substring(0, 12).ToLowerInvariant()
}

# Returns the tag of the image that the files here make: REVISION-ARCH when they are those of the
# git revision, REVISION-dirty-HASH-ARCH when not, content-HASH-ARCH outside of git.
function Get-ImageTag {
    [CmdletBinding()] param([string]$Root, [string]$Architecture)
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
                Write-Step -Message '  the work tree differs from its revision, and the tag says so'
            }
        }
    }
    "$version-$Architecture"
}

# Returns Digest and Tags of the image pushed last under a tag, or under it and -rebuilt-TIME;
# nothing when there is none.
function Get-Image {
    [CmdletBinding()] param([string]$RepositoryUri, [string]$Tag)
    $repository = $RepositoryUri.Substring($RepositoryUri.IndexOf('/') + 1)
    $query = 'imageDetails[].{Digest:imageDigest,Tags:imageTags,At:imagePushedAt}'
    $images = Invoke-AwsCli -ArgumentList 'ecr', 'describe-images', '--repository-name', $repository, '--query', $query
    $matching = @($images | Where-Object { @($_.Tags | Where-Object { $_ -eq $Tag -or $_ -like "$Tag-rebuilt-*" }).Count -gt 0 })
    $matching | Sort-Object -Property 'At' | Select-Object -Last 1
}

# Runs docker and shows what it says; throws with Advice and its last lines when it fails.
function Invoke-Docker {
    [CmdletBinding()] param([string[]]$ArgumentList, [string]$InputText, [string]$Advice)
    $result = Invoke-Native -Command 'docker' -ArgumentList $ArgumentList -InputText $InputText -Show
    if ($result.ExitCode -ne 0) {
        $tail = @($result.Output + $result.ErrorOutput | Where-Object { $_ } | Select-Object -Last 5) -join ' '
        throw "docker $($ArgumentList[0]) failed (exit code $($result.ExitCode)). $Advice Docker said: $tail"
    }
}

# Builds the image for a platform and pushes it to the repository under the tag.
function Publish-Image {
    [CmdletBinding()] param([string]$RepositoryUri, [string]$Tag, [string]$Platform)
    $image = '{0}:{1}' -f $RepositoryUri, $Tag
    $build = @('build', '--platform', $Platform, '--label', "org.opencontainers.image.revision=$Tag", '--tag', $image)
    $build += '--file', (Join-Path -Path $PSScriptRoot -ChildPath 'Dockerfile')
    if ($Rebuild) {
        $build += '--pull', '--no-cache'
    }
    $build += $PSScriptRoot
    $advice = "If it cannot run programs for $Platform, add emulation ('docker run --privileged --rm tonistiigi/binfmt --install all') or choose the other -CpuArchitecture."
    Invoke-Docker -ArgumentList $build -Advice $advice

    $password = Invoke-AwsCli -ArgumentList 'ecr', 'get-login-password' -Raw
    $advice = 'Docker could not keep the login; look at credsStore in its config.json.'
    Invoke-Docker -ArgumentList 'login', '--username', 'AWS', '--password-stdin', ($RepositoryUri -split '/')[0] -InputText $password -Advice $advice
    Invoke-Docker -ArgumentList 'push', $image -Advice 'Run this script again to go on from here.'
}

# Returns Digest and Tags of the image that the files here make: from the repository if it is
# there, built and pushed if not, or if it is to be built anew.
function Get-ContainerImage {
    [CmdletBinding()] param([string]$RepositoryUri, [string]$CpuKind)
    $architecture = @{ X86_64 = 'amd64'; ARM64 = 'arm64' }[$CpuKind]
    $tag = Get-ImageTag -Root $PSScriptRoot -Architecture $architecture
    $image = Get-Image -RepositoryUri $RepositoryUri -Tag $tag
    if ($image -and -not $Rebuild) {
        Write-Step -Message "  $(@($image.Tags)[0]) was pushed before and is used again"
        return $image
    }
    $pushed = $tag
    if ($image) {
        # The repository's tags never change, so what is built anew has one of its own.
        $pushed = '{0}-rebuilt-{1:yyyyMMddHHmmss}' -f $tag, [datetime]::UtcNow
    }
    Publish-Image -RepositoryUri $RepositoryUri -Tag $pushed -Platform "linux/$architecture"
    $image = Get-Image -RepositoryUri $RepositoryUri -Tag $tag
    if (-not $image) {
        throw "The image $pushed is not in $RepositoryUri. Run this script again to push it."
    }
    $image
}

# Tags an image that runs, so that builds which failed cannot push it out of the repository.
function Add-DeployedTag {
    [CmdletBinding()] param([string]$RepositoryUri, [object]$Image)
    if (@($Image.Tags | Where-Object { $_ -like 'deployed-*' }).Count -gt 0) {
        return
    }
    $repository = $RepositoryUri.Substring($RepositoryUri.IndexOf('/') + 1)
    $text = Invoke-AwsCli -ArgumentList 'ecr', 'batch-get-image', '--repository-name', $repository, '--image-ids', "imageDigest=$($Image.Digest)", '--query', 'images[0].imageManifest'
    $manifest = New-CliFile -Name 'manifest.json' -Text $text
    $arguments = 'ecr', 'put-image', '--repository-name', $repository, '--image-manifest', $manifest, '--image-tag', "deployed-$(@($Image.Tags)[0])"
    $null = Invoke-AwsCli -ArgumentList $arguments -AbsentPattern 'ImageAlreadyExistsException'
}

# --- The service ----------------------------------------------------------------------------------

# Returns the two tasks that stopped last for any other reason than scaling and replacement.
function Get-StoppedTask {
    [CmdletBinding()] param([string]$ClusterName)
    $arguments = 'ecs', 'list-tasks', '--cluster', $ClusterName, '--desired-status', 'STOPPED', '--query', 'taskArns'
    $arns = @(Invoke-AwsCli -ArgumentList $arguments -AbsentPattern 'ClusterNotFoundException' | Select-Object -First 100)
    if ($arns.Count -gt 0) {
        $query = 'tasks[].{Id:taskArn,At:stoppedAt,Reason:stoppedReason,Containers:containers[].{Name:name,Code:exitCode,Reason:reason}}'
        $arguments = @('ecs', 'describe-tasks', '--cluster', $ClusterName, '--query', $query, '--tasks') + $arns
        $failed = @(Invoke-AwsCli -ArgumentList $arguments | Where-Object { $_.Reason -notlike 'Scaling activity initiated by*' })
        $failed | Sort-Object -Property 'At' -Descending | Select-Object -First 2
    }
}

# Shows what ECS says, why tasks stopped, their exit codes and last log lines. Never throws: the
# error that led here matters more.
function Show-RolloutFailure {
    [CmdletBinding()] param([string]$ClusterName)
    try {
        $state = Get-ServiceState -ClusterName $ClusterName -ServiceName $ServiceName
        foreach ($said in @($state | ForEach-Object { $_.Events } | Select-Object -First 3)) {
            Write-Step -Message "  ECS: $said"
        }
        foreach ($task in @(Get-StoppedTask -ClusterName $ClusterName)) {
            $id = ($task.Id -split '/')[-1]
            Write-Step -Message "  task $id stopped: $($task.Reason)"
            foreach ($container in $task.Containers) {
                $end = "exit code $($container.Code) $($container.Reason)".TrimEnd()
                Write-Step -Message "    container $($container.Name): $end"
            }
            $arguments = 'logs', 'get-log-events', '--log-group-name', "/ecs/$ServiceName", '--log-stream-name', "gateway/websocket/$id", '--limit', '20', '--query', 'events[].message'
            foreach ($line in @(Invoke-AwsCli -ArgumentList $arguments -AbsentPattern 'ResourceNotFoundException')) {
                Write-Step -Message "    log: $line"
            }
        }
    }
    catch {
        Write-Step -Message "  Why the tasks stopped could not be read: $($_.Exception.Message)"
    }
}

# --- The deployment -------------------------------------------------------------------------------

# Runs test-connection.ps1 against the stack and throws when a check fails.
function Test-Deployment {
    [CmdletBinding()] param([object]$Stack)
    # Targets and DNS need a while after the first deployment.
    $test = @{ StackName = $StackName; AwsRegion = $AwsRegion; AccessToken = $AccessToken; WaitSeconds = 300 }
    if ($AwsProfile) {
        $test['AwsProfile'] = $AwsProfile
    }
    $outputs = $Stack.Output
    $endpoint = [uri]$outputs['WebSocketEndpoint']
    if ($endpoint.Host -ne $outputs['LoadBalancerDNS'] -and -not $Stack.Parameter['HostedZoneId']) {
        try {
            $null = [System.Net.Dns]::GetHostAddresses($endpoint.Host)
        }
        catch {
            Write-Step -Message "  $($endpoint.Host) does not resolve yet: make it a CNAME of $($outputs['LoadBalancerDNS'])."
            $test['Check'] = @('Service', 'Targets', 'Logs')
        }
    }
    & (Join-Path -Path $PSScriptRoot -ChildPath 'test-connection.ps1') @test
    if ($LASTEXITCODE -ne 0) {
        throw 'The service is deployed, but not every check passed: the lines above name the next step.'
    }
}

# Says what a deployment would do: by a change set that is deleted again, or, as that would make
# the stack, from the template for a new one.
function Show-Plan {
    [CmdletBinding()] param([AllowNull()][object]$Stack, [hashtable]$Resolved)
    if (-not $Stack -or $Stack.Status -notmatch '^(CREATE|UPDATE|UPDATE_ROLLBACK|IMPORT)_COMPLETE$') {
        if ($Stack -and $Stack.Status -ne 'REVIEW_IN_PROGRESS') {
            Write-Step -Message "  would first bring the stack, which is $($Stack.Status), into order"
        }
        $pattern = '(?m)^  (?<name>\w+):\n    Type: (?<type>AWS::\S+)$(\n    Condition: (?<if>\w+)$)?'
        foreach ($match in [regex]::Matches((Get-TemplateBody), $pattern)) {
            $line = "  would create $($match.Groups['name'].Value) ($($match.Groups['type'].Value))"
            if ($match.Groups['if'].Success) {
                $line += " if $($match.Groups['if'].Value)"
            }
            Write-Step -Message $line
        }
        Write-Step -Message '  HasImage is true from step 6 on; the parameters above decide the other conditions'
        return
    }
    $repositoryUri = $Stack.Output['WebSocketRepositoryUri']
    $architecture = @{ X86_64 = 'amd64'; ARM64 = 'arm64' }[$Resolved['CpuArchitecture'].Value]
    $tag = Get-ImageTag -Root $PSScriptRoot -Architecture $architecture
    $image = Get-Image -RepositoryUri $repositoryUri -Tag $tag
    $reference = "$($repositoryUri):$tag"
    if ($image -and -not $Rebuild) {
        $reference = "$repositoryUri@$($image.Digest)"
    }
    else {
        Write-Step -Message "  would build and push $reference"
    }
    $Resolved['ContainerImage'] = [pscustomobject]@{ Value = $reference; Source = 'built here' }
    $name = 'whatif-' + [guid]::NewGuid()
    try {
        Show-Change -ChangeSet (New-ChangeSet -Name $name -Exists $true -Resolved $Resolved)
    }
    finally {
        # Also after Ctrl-C, in the middle of either call.
        $null = Invoke-AwsCli -ArgumentList 'cloudformation', 'delete-change-set', '--stack-name', $StackName, '--change-set-name', $name -AbsentPattern 'ChangeSetNotFound'
    }
}

function Show-Summary {
    [CmdletBinding()] param([object]$Stack)
    $outputs = $Stack.Output
    Write-Step -Message ''
    Write-Step -Message "Endpoint       $($outputs['WebSocketEndpoint'])"
    Show-Security -Value $Stack.Parameter
    Write-Step -Message "Updates queue  $($outputs['UpdatesQueueUrl'])"
    Write-Step -Message "Dashboard      $($outputs['DashboardUrl'])"
    Write-Step -Message 'Next:'
    Write-Step -Message "  check it      ./test-connection.ps1 -StackName $StackName -AwsRegion $AwsRegion"
    Write-Step -Message "  talk to it    python test-websocket.py $($outputs['WebSocketEndpoint'])"
    Write-Step -Message "  read its log  aws logs tail /ecs/$ServiceName --follow --region $AwsRegion  (AWS CLI 2)"
    Write-Step -Message '  update it     run this script again; template parameters keep their values'
}

# Does everything the script's help says, in that order.
function Invoke-Deployment {
    [CmdletBinding(SupportsShouldProcess = $true)] param()
    if ($StackName -eq $MainStackName) {
        throw "-StackName and -MainStackName are both '$StackName'. The gateway needs a stack of its own."
    }
    Write-Step -Message '1 of 7  Checking tools and credentials'
    Assert-Tool -Advice @{ aws = 'Install the AWS CLI, version 2, and open a new terminal.' }
    if (-not $WhatIfPreference) {
        Assert-Tool -Advice @{ docker = 'Install Docker Desktop (on Linux: Docker Engine) and open a new terminal.' }
        Assert-DockerEngine
    }
    Assert-Credential

    Write-Step -Message "2 of 7  Reading the stacks $MainStackName and $StackName"
    $mainOutput = Get-MainStackOutput
    $template = Get-TemplateParameter
    $stack = Wait-StackIdle
    $deleted = $null
    if ($stack -and $stack.Status -ne 'REVIEW_IN_PROGRESS') {
        Assert-GatewayStack -Stack $stack
    }
    else {
        if ($stack) {
            Assert-NothingWaiting -Template $template -MainOutput $mainOutput
        }
        $deleted = Get-DeletedStack
    }

    Write-Step -Message '3 of 7  Finding network and parameters'
    $inherited = Get-Inheritance -Stack $stack -Deleted $deleted
    $resolved = Resolve-Parameter -Template $template -MainOutput $mainOutput -Inherited $inherited
    Show-Parameter -Resolved $resolved -Template $template
    $values = @{}
    foreach ($name in $resolved.Keys) {
        $values[$name] = $resolved[$name].Value
    }
    Show-Security -Value $values
    if (-not $PSCmdlet.ShouldProcess("stack $StackName", 'deploy ecs-template.yaml and the image')) {
        if ($WhatIfPreference) {
            Show-Plan -Stack $stack -Resolved $resolved
        }
        Write-Step -Message 'Nothing was changed.'
        return
    }

    Write-Step -Message '4 of 7  Making the stack, still without its service, where it is new'
    $exists = $false
    if ($stack -and $stack.Status -ne 'REVIEW_IN_PROGRESS') {
        $exists = Repair-Stack -Stack $stack
        if (-not $exists) {
            Wait-QueueName -StackId $stack.Id
        }
    }
    elseif ($deleted) {
        Wait-QueueName -StackId $deleted.Stack.Id
    }
    if (-not $exists -or -not $stack.Output['WebSocketRepositoryUri']) {
        $resolved['ContainerImage'] = [pscustomobject]@{ Value = ''; Source = 'no image yet' }
        Publish-Stack -Exists $exists -Resolved $resolved
        $stack = Get-Stack -Name $StackName
        foreach ($name in $stack.Parameter.Keys) {
            $resolved[$name] = [pscustomobject]@{ Value = $stack.Parameter[$name]; Source = 'the stack' }
        }
    }

    Write-Step -Message '5 of 7  Preparing the image'
    $repositoryUri = $stack.Output['WebSocketRepositoryUri']
    $image = Get-ContainerImage -RepositoryUri $repositoryUri -CpuKind $resolved['CpuArchitecture'].Value

    $reference = '{0}@{1}' -f $repositoryUri, $image.Digest
    Write-Step -Message "6 of 7  Deploying $reference"
    $resolved['ContainerImage'] = [pscustomobject]@{ Value = $reference; Source = 'built here' }
    $cluster = $stack.Output['ECSClusterName']
    try {
        Publish-Stack -Exists $true -Resolved $resolved -ClusterName $cluster
    }
    catch {
        Show-RolloutFailure -ClusterName $cluster
        throw
    }
    Add-DeployedTag -RepositoryUri $repositoryUri -Image $image

    Write-Step -Message '7 of 7  Testing'
    $stack = Get-Stack -Name $StackName
    Test-Deployment -Stack $stack
    Show-Summary -Stack $stack
}

# Dot-sourced, as the tests do it, the script only defines its functions.
$CalledWith = $PSBoundParameters
$ServiceName = "agenticai-websocket-$Environment"
if ($MyInvocation.InvocationName -ne '.') {
    $variables = Get-AwsEnvironment
    # Plain images: attestations would come as entries of their own that ECR cannot scan or expire.
    $variables['BUILDX_NO_DEFAULT_ATTESTATIONS'] = '1'
    $RunFolder = Join-Path -Path ([System.IO.Path]::GetTempPath()) -ChildPath "deploy-ecs-$([guid]::NewGuid())"
    $null = [System.IO.Directory]::CreateDirectory($RunFolder)
    $environmentBefore = Set-ProcessEnvironment -Value $variables
    try {
        $TemplateBody = New-CliFile -Name 'template.yaml' -Text (Get-TemplateBody)
        Invoke-Deployment
    }
    catch {
        $Host.UI.WriteErrorLine("deploy-ecs: $($_.Exception.Message)")
        if ($CalledWith.Count -gt 0) {
            Write-Step -Message "To repeat it with the same arguments: $(Get-RepeatCommand)"
        }
        Write-Verbose -Message $_.ScriptStackTrace
        exit 1
    }
    finally {
        [System.IO.Directory]::Delete($RunFolder, $true)
        $null = Set-ProcessEnvironment -Value $environmentBefore
    }
    exit 0
}
