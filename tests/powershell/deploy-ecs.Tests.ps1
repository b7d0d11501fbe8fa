# Pester 5. Run by tests/test_powershell.py, or by hand: Invoke-Pester -Path tests/powershell
BeforeAll {
    . (Join-Path -Path $PSScriptRoot -ChildPath 'FakePrograms.ps1')
    . (Join-Path -Path $PSScriptRoot -ChildPath '../../deploy-ecs.ps1')

    function ConvertTo-StackJson {
        param([hashtable]$Outputs = @{}, [hashtable]$Parameters = @{}, [string]$Status = 'UPDATE_COMPLETE')
        $stack = @{
            StackName   = 'agenticai-websocket-stack'
            StackId     = 'arn:stack'
            StackStatus = $Status
            Outputs     = @($Outputs.Keys | ForEach-Object { @{ OutputKey = $_; OutputValue = $Outputs[$_] } })
            Parameters  = @($Parameters.Keys | ForEach-Object { @{ ParameterKey = $_; ParameterValue = $Parameters[$_] } })
        }
        ConvertTo-Json -Depth 6 -InputObject @{ Stacks = @($stack) }
    }

    # An operation whose events carry whatever token it was given.
    function Add-StackEnd {
        param([string]$Status, [string]$Reason = '')
        Mock -CommandName Get-RequestToken -MockWith { 'token-1' }
        $event1 = @{ EventId = '1'; ClientRequestToken = 'token-1'; PhysicalResourceId = 'x'; LogicalResourceId = 'Service'; ResourceStatus = 'UPDATE_FAILED'; ResourceStatusReason = $Reason }
        $event2 = @{ EventId = '2'; ClientRequestToken = 'token-1'; PhysicalResourceId = 'arn:stack'; LogicalResourceId = 'stack'; ResourceStatus = $Status }
        $old = @{ EventId = '0'; ClientRequestToken = 'older'; PhysicalResourceId = 'arn:stack'; LogicalResourceId = 'stack'; ResourceStatus = 'UPDATE_COMPLETE' }
        $events = @($event2, $old)
        if ($Reason) {
            $events = @($event2, $event1, $old)
        }
        $before = ConvertTo-Json -Depth 4 -InputObject @{ StackEvents = @($old) }
        $after = ConvertTo-Json -Depth 4 -InputObject @{ StackEvents = $events }
        Add-FakeAnswer -Like 'aws cloudformation describe-stack-events*' -Text $before, $after
    }

    $template = @{ ContainerImage = ''; Environment = 'prod'; CpuArchitecture = 'X86_64'; MaxTasks = '4'; VpcId = $null; LogLevel = 'INFO'; CertificateArn = ''; DomainName = ''; HostedZoneId = '' }
    $mainOutputs = @{ DataTableName = 't'; PMQueueUrl = 'p'; DevQueueUrl = 'd'; QAQueueUrl = 'q'; OpsQueueUrl = 'o' }
    $gatewayOutputs = @{
        WebSocketEndpoint      = 'ws://lb.example.com'
        LoadBalancerDNS        = 'lb.example.com'
        WebSocketRepositoryUri = '123456789012.dkr.ecr.us-east-1.amazonaws.com/agenticai-websocket-prod'
        ECSClusterName         = 'agenticai-cluster-prod'
    }
    $stableService = '{"services":[{"status":"ACTIVE","runningCount":1,"desiredCount":1,"pendingCount":0,"events":[],"deployments":[{"status":"PRIMARY","rolloutState":"COMPLETED"}]}]}'
}

AfterAll {
    Remove-FakeProgram
}

Describe 'Get-MainStackOutput' {
    BeforeEach { Clear-FakeProgram }

    It 'names every output that is missing, at once' {
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*' -Text (ConvertTo-StackJson -Outputs @{ DataTableName = 't'; QAQueueUrl = 'q' })
        { Get-MainStackOutput -MainStackName 'main' } | Should -Throw '*PMQueueUrl, DevQueueUrl, OpsQueueUrl*'
    }

    It 'returns what the template takes and nothing else' {
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*' -Text (ConvertTo-StackJson -Outputs ($mainOutputs + @{ Other = 'x' }))
        $values = Get-MainStackOutput -MainStackName 'main'
        $values.Count | Should -Be 5
        $values['OpsQueueUrl'] | Should -Be 'o'
    }

    It 'says what to do when there is no such stack' {
        Add-FakeAnswer -Like 'aws *' -Text 'Stack with id main does not exist' -ExitCode 255
        { Get-MainStackOutput -MainStackName 'main' } | Should -Throw '*-MainStackName*'
    }
}

Describe 'Assert-GatewayStack' {
    It 'refuses a stack of another template' {
        $stack = (ConvertTo-StackJson -Parameters @{ Environment = 'prod' } | ConvertFrom-Json).Stacks[0]
        { Assert-GatewayStack -Stack $stack -Environment 'prod' } | Should -Throw '*not made from ecs-template.yaml*'
    }

    It 'refuses the stack of another environment' {
        $stack = (ConvertTo-StackJson -Parameters @{ Environment = 'staging'; ContainerImage = '' } | ConvertFrom-Json).Stacks[0]
        { Assert-GatewayStack -Stack $stack -Environment 'prod' } | Should -Throw '*-Environment staging*'
        { Assert-GatewayStack -Stack $stack -Environment 'staging' } | Should -Not -Throw
    }
}

Describe 'Get-VpcId' {
    BeforeEach { Clear-FakeProgram }

    It 'takes the default VPC' {
        Add-FakeAnswer -Like 'aws ec2 describe-vpcs*' -Text '{"Vpcs":[{"VpcId":"vpc-1","IsDefault":false},{"VpcId":"vpc-2","IsDefault":true}]}'
        Get-VpcId | Should -Be 'vpc-2'
    }

    It 'takes the only one' {
        Add-FakeAnswer -Like 'aws ec2 describe-vpcs*' -Text '{"Vpcs":[{"VpcId":"vpc-1","IsDefault":false}]}'
        Get-VpcId | Should -Be 'vpc-1'
    }

    It 'names the choice when there are several, and the way out when there is none' {
        Add-FakeAnswer -Like 'aws ec2 describe-vpcs*' -Text '{"Vpcs":[{"VpcId":"vpc-1"},{"VpcId":"vpc-2"}]}', '{"Vpcs":[]}'
        { Get-VpcId } | Should -Throw '*-VpcId*vpc-1*vpc-2*'
        { Get-VpcId } | Should -Throw '*create-default-vpc*'
    }
}

Describe 'Get-NetworkParameter' {
    BeforeEach {
        Clear-FakeProgram
        Add-FakeAnswer -Like 'aws ec2 describe-vpcs*' -Text '{"Vpcs":[{"VpcId":"vpc-1","IsDefault":true}]}'
        $subnets = foreach ($zone in 'a', 'b', 'c') {
            @{ SubnetId = "subnet-1$zone"; AvailabilityZone = "us-east-1$zone" }
            @{ SubnetId = "subnet-2$zone"; AvailabilityZone = "us-east-1$zone" }
        }
        $subnets += @{ SubnetId = 'subnet-0'; AvailabilityZone = 'us-east-1-bos-1a' }
        Add-FakeAnswer -Like 'aws ec2 describe-subnets*' -Text (ConvertTo-Json -InputObject @{ Subnets = $subnets })
        $public = @{ Associations = @(@{ Main = $true }); Routes = @(@{ DestinationCidrBlock = '0.0.0.0/0'; GatewayId = 'igw-1'; State = 'active' }) }
        $nat = @{
            Associations = @(@{ Main = $false; SubnetId = 'subnet-2b' }, @{ Main = $false; SubnetId = 'subnet-2c' })
            Routes       = @(@{ DestinationCidrBlock = '0.0.0.0/0'; NatGatewayId = 'nat-1'; State = 'active' })
        }
    }

    It 'puts tasks into private subnets with a NAT route, in the zones of the load balancer' {
        Add-FakeAnswer -Like 'aws ec2 describe-route-tables*' -Text (ConvertTo-Json -Depth 6 -InputObject @{ RouteTables = @($public, $nat) })
        $network = Get-NetworkParameter -AwsRegion 'us-east-1'
        $network['VpcId'] | Should -Be 'vpc-1'
        $network['LoadBalancerSubnetIds'] | Should -Be 'subnet-1b,subnet-1c'
        $network['TaskSubnetIds'] | Should -Be 'subnet-2b,subnet-2c'
        $network['AssignPublicIp'] | Should -Be 'DISABLED'
    }

    It 'gives tasks public addresses where there is no NAT route' {
        Add-FakeAnswer -Like 'aws ec2 describe-route-tables*' -Text (ConvertTo-Json -Depth 6 -InputObject @{ RouteTables = @($public) })
        $network = Get-NetworkParameter -AwsRegion 'us-east-1'
        $network['LoadBalancerSubnetIds'] | Should -Be 'subnet-1a,subnet-1b'
        $network['TaskSubnetIds'] | Should -Be 'subnet-1a,subnet-1b'
        $network['AssignPublicIp'] | Should -Be 'ENABLED'
    }

    It 'takes the subnets that are given, and knows whether tasks need an address' {
        Add-FakeAnswer -Like 'aws ec2 describe-route-tables*' -Text (ConvertTo-Json -Depth 6 -InputObject @{ RouteTables = @($public, $nat) })
        $network = Get-NetworkParameter -VpcId 'vpc-1' -LoadBalancerSubnetId 'subnet-1a', 'subnet-1c' -TaskSubnetId 'subnet-2b', 'subnet-2c' -AwsRegion 'us-east-1'
        $network['LoadBalancerSubnetIds'] | Should -Be 'subnet-1a,subnet-1c'
        $network['TaskSubnetIds'] | Should -Be 'subnet-2b,subnet-2c'
        $network['AssignPublicIp'] | Should -Be 'DISABLED'
        { Get-NetworkParameter -VpcId 'vpc-1' -TaskSubnetId 'subnet-ff' -AwsRegion 'us-east-1' } | Should -Throw '*subnet-ff*'
        { Get-NetworkParameter -TaskSubnetId 'subnet-2b' -AwsRegion 'us-east-1' } | Should -Throw '*-VpcId*'
    }

    It 'asks for a second zone' {
        { Select-Subnet -Subnet @([pscustomobject]@{ Id = 's'; Zone = 'us-east-1a'; Kind = 'Public' }) } | Should -Throw '*two zones*'
    }
}

Describe 'Template parameters' {
    It 'keeps previous values, sets given ones, leaves the rest to their defaults' {
        $merged = @(Merge-StackParameter -Given @{ MaxTasks = '8' } -Previous @{ LogLevel = 'DEBUG'; Gone = 'x' } -Template $template)
        $merged.Name | Should -Be 'LogLevel', 'MaxTasks'
        $json = ConvertTo-ParameterJson -Parameter $merged | ConvertFrom-Json
        $json[0].UsePreviousValue | Should -BeTrue
        $json[1].ParameterValue | Should -Be '8'
    }

    It 'writes a list for a single parameter, too' {
        $json = ConvertTo-ParameterJson -Parameter @([pscustomobject]@{ Name = 'A'; Value = 'say "hi"'; Keep = $false })
        $json.Substring(0, 1) | Should -Be '['
        ($json | ConvertFrom-Json).ParameterValue | Should -Be 'say "hi"'
    }

    It 'takes overrides in any spelling and type' {
        $resolved = Resolve-Override -Override @{ maxtasks = 8; LogLevel = @('a', 'b'); DomainName = $true } -Template $template
        @($resolved.Keys) | Should -Contain 'MaxTasks'
        $resolved['MaxTasks'] | Should -BeExactly '8'
        $resolved['LogLevel'] | Should -Be 'a,b'
        $resolved['DomainName'] | Should -BeExactly 'true'
    }

    It 'refuses overrides the template does not have, or that are not to be set' {
        { Resolve-Override -Override @{ MaxTaks = 1; Foo = 2 } -Template $template } | Should -Throw '*Foo, MaxTaks*MaxTasks*'
        { Resolve-Override -Override @{ ContainerImage = 'x' } -Template $template } | Should -Throw '*ContainerImage*'
    }

    It 'leaves the network of a stack alone unless told' {
        Clear-FakeProgram
        $request = @{ Environment = 'prod'; AwsRegion = 'us-east-1'; VpcId = ''; Override = @{} }
        $given = Get-GivenParameter -Request $request -MainOutput $mainOutputs -Previous @{ VpcId = 'vpc-9' } -Template $template
        $given.ContainsKey('VpcId') | Should -BeFalse
        $given['PMQueueUrl'] | Should -Be 'p'
        Get-FakeCall | Should -BeNullOrEmpty
    }

    It 'connects to the certificate''s name, and wants the certificate in the same region' {
        Clear-FakeProgram
        Add-FakeAnswer -Like 'aws acm describe-certificate*' -Text '{"Certificate":{"Status":"ISSUED","DomainName":"*.example.com","SubjectAlternativeNames":["*.example.com","ws.example.com"]}}'
        $request = @{ Environment = 'prod'; AwsRegion = 'us-east-1'; VpcId = ''; Override = @{ CertificateArn = 'arn:aws:acm:us-east-1:123456789012:certificate/1' } }
        $given = Get-GivenParameter -Request $request -MainOutput $mainOutputs -Previous @{ VpcId = 'vpc-9' } -Template $template
        $given['DomainName'] | Should -Be 'ws.example.com'
        $request['AwsRegion'] = 'eu-west-1'
        { Get-GivenParameter -Request $request -MainOutput $mainOutputs -Previous @{ VpcId = 'vpc-9' } -Template $template } | Should -Throw '*us-east-1*'
    }
}

Describe 'Repair-Stack' {
    BeforeEach {
        Clear-FakeProgram
        Mock -CommandName Start-Sleep
    }

    It 'deletes a stack whose creation failed' {
        Add-StackEnd -Status 'DELETE_COMPLETE'
        Add-FakeAnswer -Like 'aws cloudformation delete-stack*' -Text ''
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*' -Text 'does not exist' -ExitCode 255
        $stack = [pscustomobject]@{ StackName = 's'; StackId = 'arn:stack'; StackStatus = 'ROLLBACK_COMPLETE' }
        Repair-Stack -Stack $stack -TimeoutMinutes 5 | Should -BeNullOrEmpty
        (Get-FakeCall -Like '*delete-stack*').Count | Should -Be 1
    }

    It 'continues a rollback that got stuck' {
        Add-StackEnd -Status 'UPDATE_ROLLBACK_COMPLETE'
        Add-FakeAnswer -Like 'aws cloudformation continue-update-rollback*' -Text ''
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*' -Text (ConvertTo-StackJson -Status 'UPDATE_ROLLBACK_COMPLETE')
        $stack = [pscustomobject]@{ StackName = 's'; StackId = 'arn:stack'; StackStatus = 'UPDATE_ROLLBACK_FAILED' }
        (Repair-Stack -Stack $stack -TimeoutMinutes 5).StackStatus | Should -Be 'UPDATE_ROLLBACK_COMPLETE'
    }

    It 'gives the reason when that does not help' {
        Add-StackEnd -Status 'UPDATE_ROLLBACK_FAILED' -Reason 'the queue is gone'
        Add-FakeAnswer -Like 'aws cloudformation continue-update-rollback*' -Text ''
        $stack = [pscustomobject]@{ StackName = 's'; StackId = 'arn:stack'; StackStatus = 'UPDATE_ROLLBACK_FAILED' }
        { Repair-Stack -Stack $stack -TimeoutMinutes 5 } | Should -Throw '*the queue is gone*'
    }

    It 'changes nothing with -WhatIf, nor where nothing is wrong' {
        $stack = [pscustomobject]@{ StackName = 's'; StackId = 'arn:stack'; StackStatus = 'ROLLBACK_COMPLETE' }
        Repair-Stack -Stack $stack -TimeoutMinutes 5 -WhatIf | Should -Be $stack
        $stack.StackStatus = 'UPDATE_COMPLETE'
        Repair-Stack -Stack $stack -TimeoutMinutes 5 | Should -Be $stack
        Get-FakeCall | Should -BeNullOrEmpty
    }
}

Describe 'Wait-StackIdle' {
    It 'waits for the end of another operation' {
        Clear-FakeProgram
        Mock -CommandName Start-Sleep
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*' -Text (ConvertTo-StackJson -Status 'UPDATE_IN_PROGRESS'), (ConvertTo-StackJson -Status 'UPDATE_COMPLETE')
        (Wait-StackIdle -StackName 's' -TimeoutMinutes 5).StackStatus | Should -Be 'UPDATE_COMPLETE'
        Should -Invoke -CommandName Start-Sleep -Times 1 -Exactly
    }
}

Describe 'Publish-Stack' {
    BeforeEach {
        Clear-FakeProgram
        Mock -CommandName Start-Sleep
        Add-FakeAnswer -Like 'aws cloudformation create-change-set*' -Text '{"Id":"arn:change-set","StackId":"arn:stack"}'
        Add-FakeAnswer -Like 'aws cloudformation execute-change-set*' -Text ''
        Add-FakeAnswer -Like 'aws cloudformation delete-change-set*' -Text ''
        $publish = @{
            StackName      = 's'
            Exists         = $true
            TemplatePath   = '/ecs-template.yaml'
            Parameter      = @([pscustomobject]@{ Name = 'MaxTasks'; Value = '8'; Keep = $false })
            TimeoutMinutes = 5
        }
        $ready = '{"Status":"CREATE_COMPLETE","ChangeSetId":"arn:change-set","StackId":"arn:stack","Changes":[{"ResourceChange":{"Action":"Modify","LogicalResourceId":"Service","ResourceType":"AWS::ECS::Service"}}]}'
    }

    It 'executes the change set and waits for its end' {
        Add-FakeAnswer -Like 'aws cloudformation describe-change-set*' -Text '{"Status":"CREATE_IN_PROGRESS"}', $ready
        Add-StackEnd -Status 'UPDATE_COMPLETE'
        Publish-Stack @publish | Should -Be 'Changed'
        (Get-FakeCall -Like '*create-change-set*--change-set-type UPDATE*--capabilities CAPABILITY_NAMED_IAM').Count | Should -Be 1
        (Get-FakeCall -Like '*execute-change-set*--client-request-token token-1').Count | Should -Be 1
    }

    It 'changes nothing when nothing would change' {
        Add-FakeAnswer -Like 'aws cloudformation describe-change-set*' -Text '{"Status":"FAILED","StatusReason":"The submitted information didn''t contain changes. Submit different information to create a change set."}'
        Publish-Stack @publish | Should -Be 'Unchanged'
        (Get-FakeCall -Like '*delete-change-set*').Count | Should -Be 1
        Get-FakeCall -Like '*execute-change-set*' | Should -BeNullOrEmpty
    }

    It 'says why a change is not accepted' {
        Add-FakeAnswer -Like 'aws cloudformation describe-change-set*' -Text '{"Status":"FAILED","StatusReason":"Parameter MaxTasks must be a number"}'
        { Publish-Stack @publish } | Should -Throw '*MaxTasks must be a number*'
    }

    It 'throws with the reasons when the stack rolls back' {
        Add-FakeAnswer -Like 'aws cloudformation describe-change-set*' -Text $ready
        Add-StackEnd -Status 'UPDATE_ROLLBACK_COMPLETE' -Reason 'ECS Deployment Circuit Breaker was triggered'
        { Publish-Stack @publish } | Should -Throw '*UPDATE_ROLLBACK_COMPLETE*Circuit Breaker*'
    }

    It 'creates a stack that is not there' {
        Add-FakeAnswer -Like 'aws cloudformation describe-change-set*' -Text $ready
        Add-StackEnd -Status 'CREATE_COMPLETE'
        $publish['Exists'] = $false
        Publish-Stack @publish | Should -Be 'Changed'
        (Get-FakeCall -Like '*--change-set-type CREATE*').Count | Should -Be 1
    }

    It 'does nothing with -WhatIf' {
        Publish-Stack @publish -WhatIf | Should -Be 'Skipped'
        Get-FakeCall | Should -BeNullOrEmpty
    }
}

Describe 'The image' {
    BeforeEach {
        Clear-FakeProgram
        Add-FakeAnswer -Like 'git*rev-parse*' -Text '3f2a9c1b7d10'
        Add-FakeAnswer -Like 'git*status*' -Text @()
        $repository = '123456789012.dkr.ecr.us-east-1.amazonaws.com/agenticai-websocket-prod'
        $root = Join-Path -Path $PSScriptRoot -ChildPath '../..'
    }

    It 'is tagged with the git revision and the processor' {
        Get-ImageTag -Root $root -Platform 'linux/arm64' | Should -Be '3f2a9c1b7d10-arm64'
    }

    It 'is tagged with its content, too, when that is not the revision''s' {
        Add-FakeAnswer -Like 'git*status*' -Text ' M server.py'
        Get-ImageTag -Root $root -Platform 'linux/amd64' | Should -Match '^3f2a9c1b7d10-dirty-[0-9a-f]{12}-amd64$'
    }

    It 'is tagged with its content alone outside of git' {
        Add-FakeAnswer -Like 'git*rev-parse*' -Text 'not a git repository' -ExitCode 128
        Get-ImageTag -Root $root -Platform 'linux/amd64' | Should -Match '^content-[0-9a-f]{12}-amd64$'
    }

    It 'is used again when its revision was pushed before' {
        Mock -CommandName Get-ImageTag -MockWith { 'tag' }
        Add-FakeAnswer -Like 'aws ecr describe-images*--repository-name agenticai-websocket-prod --image-ids imageTag=tag' -Text '{"imageDetails":[{"imageDigest":"sha256:abc"}]}'
        Get-ContainerImage -RepositoryUri $repository -CpuArchitecture 'X86_64' | Should -Be "$repository@sha256:abc"
        Get-FakeCall -Like 'docker*' | Should -BeNullOrEmpty
    }

    It 'is built for the right processor and pushed when it is not there' {
        Mock -CommandName Get-ImageTag -MockWith { 'tag' }
        Mock -CommandName Get-ImageDigest -MockWith { if (Get-FakeCall -Like 'docker push*') { 'sha256:new' } }
        Add-FakeAnswer -Like 'docker*' -Text 'done'
        Add-FakeAnswer -Like 'aws ecr get-login-password*' -Text 'secret'
        Get-ContainerImage -RepositoryUri $repository -CpuArchitecture 'ARM64' | Should -Be "$repository@sha256:new"
        (Get-FakeCall -Like 'docker build --platform linux/arm64*').Count | Should -Be 1
        (Get-FakeCall -Like 'docker login --username AWS --password-stdin 123456789012.dkr.ecr.us-east-1.amazonaws.com').Count | Should -Be 1
        (Get-FakeCall -Like "docker push $($repository):tag").Count | Should -Be 1
        Get-FakeCall -Like '*secret*' | Should -BeNullOrEmpty
    }

    It 'stops at a build that fails, with what docker said' {
        Mock -CommandName Get-ImageTag -MockWith { 'tag' }
        Mock -CommandName Get-ImageDigest
        Add-FakeAnswer -Like 'docker build*' -Text 'exec format error' -ExitCode 1
        { Get-ContainerImage -RepositoryUri $repository -CpuArchitecture 'ARM64' } | Should -Throw '*exec format error*'
        Get-FakeCall -Like 'docker push*' | Should -BeNullOrEmpty
    }
}

Describe 'A failed rollout' {
    It 'shows why tasks stopped and their last log lines, and throws the first error' {
        Clear-FakeProgram
        Add-FakeAnswer -Like 'aws ecs describe-services*' -Text '{"services":[{"status":"ACTIVE","events":[{"message":"unable to place a task"}]}]}'
        Add-FakeAnswer -Like 'aws ecs list-tasks*--desired-status STOPPED' -Text '{"taskArns":["arn:aws:ecs:r:1:task/c/t1"]}'
        Add-FakeAnswer -Like 'aws ecs describe-tasks*' -Text '{"tasks":[{"taskArn":"arn:aws:ecs:r:1:task/c/t1","taskDefinitionArn":"arn:td","stoppedReason":"Essential container in task exited","containers":[{"name":"gateway","exitCode":2}]}]}'
        Add-FakeAnswer -Like 'aws ecs describe-task-definition*' -Text '{"taskDefinition":{"containerDefinitions":[{"name":"gateway","logConfiguration":{"options":{"awslogs-group":"/ecs/x","awslogs-stream-prefix":"p"}}}]}}'
        Add-FakeAnswer -Like 'aws logs get-log-events*--log-stream-name p/gateway/t1*' -Text '{"events":[{"message":"bad setting"}]}'
        Mock -CommandName Publish-Stack -MockWith { throw 'rolled back' }
        Mock -CommandName Write-Step
        $state = @{ Exists = $true; Parameter = @{}; Output = $gatewayOutputs }
        $deploy = @{ StackName = 's'; TemplatePath = 't'; TimeoutMinutes = 5 }
        $parameter = @([pscustomobject]@{ Name = 'A'; Value = 'b'; Keep = $false })
        { Publish-Service -Deploy $deploy -State $state -Parameter $parameter -ServiceName 'x' } | Should -Throw 'rolled back'
        Should -Invoke -CommandName Write-Step -ParameterFilter { $Message -like 'ECS: unable to place*' } -Times 1 -Exactly
        Should -Invoke -CommandName Write-Step -ParameterFilter { $Message -like '*t1 stopped: Essential container*' } -Times 1 -Exactly
        Should -Invoke -CommandName Write-Step -ParameterFilter { $Message -like '*gateway: exit code 2*' } -Times 1 -Exactly
        Should -Invoke -CommandName Write-Step -ParameterFilter { $Message -like '*log: bad setting*' } -Times 1 -Exactly
    }

    It 'does not hide the error when the tasks cannot be read' {
        Clear-FakeProgram
        Add-FakeAnswer -Like 'aws *' -Text 'AccessDenied' -ExitCode 255
        { Show-RolloutFailure -ClusterName 'c' -ServiceName 's' } | Should -Not -Throw
    }
}

Describe 'Invoke-Deployment' {
    BeforeEach {
        Clear-FakeProgram
        Mock -CommandName Start-Sleep
        Mock -CommandName Test-Deployment
        Mock -CommandName Get-ImageTag -MockWith { 'tag' }
        Add-FakeAnswer -Like 'docker version*' -Text 'linux'
        Add-FakeAnswer -Like 'aws sts*' -Text '{"Account":"123456789012"}'
        $summary = @($template.Keys | ForEach-Object { @{ ParameterKey = $_; DefaultValue = $template[$_] } })
        Add-FakeAnswer -Like 'aws cloudformation get-template-summary*' -Text (ConvertTo-Json -Depth 4 -InputObject @{ Parameters = $summary })
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*agenticai-stack' -Text (ConvertTo-StackJson -Outputs $mainOutputs)
        Add-FakeAnswer -Like 'aws ecs describe-services*' -Text $stableService
        Add-FakeAnswer -Like 'aws ecr describe-images*' -Text '{"imageDetails":[{"imageDigest":"sha256:abc"}]}'
        $standing = ConvertTo-StackJson -Outputs $gatewayOutputs -Parameters @{ Environment = 'prod'; ContainerImage = 'x'; VpcId = 'vpc-1' }
        $request = @{ Environment = 'prod'; AwsRegion = 'us-east-1'; StackName = 'gateway'; MainStackName = 'agenticai-stack'; VpcId = ''; Override = @{}; TimeoutMinutes = 5 }
        $test = @{ StackName = 'gateway'; AwsRegion = 'us-east-1' }
    }

    It 'deploys once when the stack stands: image and template together' {
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*gateway' -Text $standing
        Mock -CommandName Publish-Stack -MockWith { 'Changed' }
        Invoke-Deployment -Request $request -Test $test
        Should -Invoke -CommandName Publish-Stack -Times 1 -Exactly
        Should -Invoke -CommandName Publish-Stack -Times 1 -Exactly -ParameterFilter {
            $Exists -and @($Parameter | Where-Object { $_.Name -eq 'ContainerImage' -and $_.Value -like '*@sha256:abc' }).Count -eq 1
        }
        Should -Invoke -CommandName Test-Deployment -Times 1 -Exactly
    }

    It 'deploys twice the first time, at first without an image' {
        Mock -CommandName Get-NetworkParameter -MockWith { @{ VpcId = 'vpc-1'; AssignPublicIp = 'ENABLED' } }
        Mock -CommandName Publish-Stack -MockWith {
            Add-FakeAnswer -Like 'aws cloudformation describe-stacks*gateway' -Text $standing
            'Changed'
        }
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*gateway' -Text 'does not exist' -ExitCode 255
        Invoke-Deployment -Request $request -Test $test
        Should -Invoke -CommandName Publish-Stack -Times 2 -Exactly
        Should -Invoke -CommandName Publish-Stack -Times 1 -Exactly -ParameterFilter {
            -not $Exists -and @($Parameter | Where-Object { $_.Name -eq 'ContainerImage' -and $_.Value -eq '' }).Count -eq 1
        }
    }

    It 'changes nothing with -WhatIf, whatever there is' {
        Mock -CommandName Get-NetworkParameter -MockWith { @{ VpcId = 'vpc-1' } }
        $WhatIfPreference = $true
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*gateway' -Text 'does not exist' -ExitCode 255
        Invoke-Deployment -Request $request -Test $test
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*gateway' -Text $standing
        Invoke-Deployment -Request $request -Test $test
        $WhatIfPreference = $false
        $changing = @(Get-FakeCall | Where-Object { $_ -notmatch '^(aws \S+ (describe|get|list)-|docker version|git)' })
        $changing | Should -BeNullOrEmpty
        Should -Invoke -CommandName Test-Deployment -Times 0 -Exactly
    }

    It 'does not touch the main stack' {
        $request['StackName'] = 'agenticai-stack'
        { Invoke-Deployment -Request $request -Test $test } | Should -Throw '*a stack of its own*'
        Get-FakeCall | Should -BeNullOrEmpty
    }

    It 'asks for credentials when AWS does not take them' {
        Add-FakeAnswer -Like 'aws sts*' -Text 'Unable to locate credentials' -ExitCode 253
        { Invoke-Deployment -Request $request -Test $test } | Should -Throw '*aws configure*Unable to locate credentials*'
    }

    It 'leaves out the checks from outside while a record of the operator''s own does not resolve' {
        Mock -CommandName Test-DnsRecord -MockWith { $false }
        $own = $gatewayOutputs.Clone()
        $own['WebSocketEndpoint'] = 'wss://ws.example.com'
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*gateway' -Text (ConvertTo-StackJson -Outputs $own -Parameters @{ Environment = 'prod'; ContainerImage = 'x' })
        Complete-Deployment -Request $request -Test $test
        $test['Check'] | Should -Be 'Service', 'Targets', 'Logs'
    }
}
