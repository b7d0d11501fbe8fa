# Pester 5. Run by tests/test_powershell.py, or by hand: Invoke-Pester -Path tests/powershell
# What the script works out by itself; what it does to AWS is in tests/test_deployment.py.
BeforeAll {
    . (Join-Path -Path $PSScriptRoot -ChildPath 'FakePrograms.ps1')
    . (Join-Path -Path $PSScriptRoot -ChildPath '../../deploy-ecs.ps1')

    function ConvertTo-StackJson {
        param([hashtable]$Outputs = @{}, [hashtable]$Parameters = @{}, [string]$Status = 'UPDATE_COMPLETE')
        $stack = @{ Id = 'arn:stack'; Name = 'gateway'; Status = $Status; Reason = $null }
        $stack['Outputs'] = @($Outputs.Keys | ForEach-Object { , @($_, $Outputs[$_]) })
        $stack['Parameters'] = @($Parameters.Keys | ForEach-Object { , @($_, $Parameters[$_]) })
        ConvertTo-Json -Depth 6 -InputObject $stack
    }

    $mainOutputs = @{ DataTableName = 't'; PMQueueUrl = 'pm'; DevQueueUrl = 'dev'; QAQueueUrl = 'qa'; OpsQueueUrl = 'ops'; Other = 'x' }
    $template = @{ Environment = 'prod'; ContainerImage = ''; VpcId = $null; CertificateArn = ''; DomainName = ''; HostedZoneId = ''; CpuArchitecture = 'X86_64'; AuthJwksUrl = ''; MaxTasks = '4'; LogLevel = 'INFO' }
}

AfterAll {
    Remove-FakeProgram
}

Describe 'Get-MainStackOutput' {
    BeforeEach { Clear-FakeProgram }

    It 'names every output that is missing, at once' {
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*' -Text (ConvertTo-StackJson -Outputs @{ DataTableName = 't'; QAQueueUrl = 'q' })
        { Get-MainStackOutput } | Should -Throw '*PMQueueUrl, DevQueueUrl, OpsQueueUrl*'
    }

    It 'returns what the template takes and nothing else' {
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*' -Text (ConvertTo-StackJson -Outputs $mainOutputs)
        $found = Get-MainStackOutput
        $found.Count | Should -Be 5
        $found['PMQueueUrl'] | Should -Be 'pm'
    }

    It 'says what to do when there is no such stack' {
        Add-FakeAnswer -Like 'aws *' -Text 'Stack with id x does not exist' -ExitCode 255
        { Get-MainStackOutput } | Should -Throw '*does not exist*-MainStackName*'
    }
}

Describe 'Assert-GatewayStack' {
    It 'refuses <Name>' -TestCases @(
        @{ Name = 'a stack of another template'; Parameters = @{ Other = 'x' }; Status = 'CREATE_COMPLETE'; Says = '*not made from ecs-template.yaml*' }
        @{ Name = 'the stack of another environment'; Parameters = @{ Environment = 'staging'; ContainerImage = '' }; Status = 'CREATE_COMPLETE'; Says = "*the environment 'staging'*" }
        @{ Name = 'a stack that cannot be deleted'; Parameters = @{ Environment = 'prod'; ContainerImage = '' }; Status = 'DELETE_FAILED'; Says = '*delete-stack*' }
    ) {
        $stack = [pscustomobject]@{ Parameter = $Parameters; Status = $Status; Reason = 'why' }
        { Assert-GatewayStack -Stack $stack } | Should -Throw $Says
    }
}

Describe 'The network' {
    BeforeEach {
        Clear-FakeProgram
        $subnets = @(
            [pscustomobject]@{ Id = 'pub-a'; Zone = 'us-east-1a'; Kind = 'Public' }
            [pscustomobject]@{ Id = 'pub-b'; Zone = 'us-east-1b'; Kind = 'Public' }
            [pscustomobject]@{ Id = 'pub-c'; Zone = 'us-east-1c'; Kind = 'Public' }
            [pscustomobject]@{ Id = 'nat-b'; Zone = 'us-east-1b'; Kind = 'Nat' }
            [pscustomobject]@{ Id = 'nat-c'; Zone = 'us-east-1c'; Kind = 'Nat' }
        )
    }

    It 'takes the default VPC, or the only one' {
        Add-FakeAnswer -Like 'aws ec2 describe-vpcs*' -Text '[{"Id":"vpc-1","Default":false,"Range":"10.0.0.0/16"},{"Id":"vpc-2","Default":true,"Range":"172.31.0.0/16"}]'
        Get-VpcId | Should -Be 'vpc-2'
        Add-FakeAnswer -Like 'aws ec2 describe-vpcs*' -Text '[{"Id":"vpc-1","Default":false,"Range":"10.0.0.0/16"}]'
        Get-VpcId | Should -Be 'vpc-1'
    }

    It 'names the choice when there are several, and the way out when there is none' {
        Add-FakeAnswer -Like 'aws ec2 describe-vpcs*' -Text '[{"Id":"vpc-1","Default":false,"Range":"10.0.0.0/16"},{"Id":"vpc-2","Default":false,"Range":"10.1.0.0/16"}]'
        { Get-VpcId } | Should -Throw '*-VpcId: vpc-1 (10.0.0.0/16), vpc-2*'
        Add-FakeAnswer -Like 'aws ec2 describe-vpcs*' -Text '[]'
        { Get-VpcId } | Should -Throw '*create-default-vpc*'
    }

    It 'puts tasks into private subnets with a NAT route, in the zones of the load balancer' {
        $found = Select-Subnet -Subnet $subnets
        $found['LoadBalancerSubnetIds'] | Should -Be 'pub-b,pub-c'
        $found['TaskSubnetIds'] | Should -Be 'nat-b,nat-c'
        $found['AssignPublicIp'] | Should -Be 'DISABLED'
    }

    It 'gives tasks public addresses where there is no NAT route' {
        $found = Select-Subnet -Subnet $subnets[0..3]
        $found['TaskSubnetIds'] | Should -Be 'pub-a,pub-b'
        $found['AssignPublicIp'] | Should -Be 'ENABLED'
    }

    It 'asks for a second zone' {
        { Select-Subnet -Subnet $subnets[0] } | Should -Throw '*two zones, and there are 1*'
    }

    It 'follows the main route table where a subnet has none of its own' {
        $main = [pscustomobject]@{ Subnets = $null; Main = @($true); Routes = @([pscustomobject]@{ Gateway = 'igw-1'; Nat = $null; State = 'active' }) }
        $own = [pscustomobject]@{ Subnets = @('a'); Main = @($false); Routes = @([pscustomobject]@{ Gateway = $null; Nat = 'nat-1'; State = 'active' }) }
        $dead = [pscustomobject]@{ Subnets = @('b'); Main = @($false); Routes = @([pscustomobject]@{ Gateway = $null; Nat = 'nat-1'; State = 'blackhole' }) }
        $tables = $main, $own, $dead
        Get-RouteKind -SubnetId 'a' -RouteTable $tables | Should -Be 'Nat'
        Get-RouteKind -SubnetId 'b' -RouteTable $tables | Should -Be 'None'
        Get-RouteKind -SubnetId 'c' -RouteTable $tables | Should -Be 'Public'
    }
}

Describe 'Template parameters' {
    It 'takes overrides in any spelling and type' {
        $found = Resolve-Override -Override @{ maxtasks = 8; LogLevel = 'DEBUG'; VpcId = @('a', 'b') } -Template $template
        $found.Keys | Should -Contain 'MaxTasks'
        $found['MaxTasks'] | Should -Be '8'
        $found['VpcId'] | Should -Be 'a,b'
        ConvertTo-ParameterValue -Value $true | Should -Be 'true'
    }

    It 'refuses overrides the template does not have, or that are not to be set' {
        { Resolve-Override -Override @{ Nonsense = 1 } -Template $template } | Should -Throw '*no parameter Nonsense*AuthJwksUrl*'
        { Resolve-Override -Override @{ ContainerImage = 'x' } -Template $template } | Should -Throw '*cannot set ContainerImage*'
    }

    It 'takes over what a failed creation was given, but no image and nothing hidden' {
        $stack = [pscustomobject]@{ Status = 'ROLLBACK_COMPLETE'; Parameter = @{ AuthJwksUrl = 'https://a'; ContainerImage = 'x'; Secret = '****' } }
        $found = Get-Inheritance -Stack $stack
        $found.Value.Count | Should -Be 1
        $found.Value['AuthJwksUrl'] | Should -Be 'https://a'
        $found.Source | Should -BeLike '*ROLLBACK_COMPLETE*'
    }

    It 'takes nothing over from what a person deleted' {
        $deleted = [pscustomobject]@{ ByThisScript = $false; Stack = [pscustomobject]@{ Parameter = @{ AuthJwksUrl = 'https://a' } } }
        (Get-Inheritance -Stack $null -Deleted $deleted).Value.Count | Should -Be 0
    }

    It 'keeps what the stack has, sets what is given, and says from where' {
        $inherited = [pscustomobject]@{ Source = 'the stack'; Value = @{ VpcId = 'vpc-1'; AuthJwksUrl = 'https://a'; MaxTasks = '4' } }
        $ParameterOverride = @{ MaxTasks = 8 }
        $found = Resolve-Parameter -Template $template -MainOutput @{} -Inherited $inherited
        $found['AuthJwksUrl'].Source | Should -Be 'the stack'
        $found['MaxTasks'].Value | Should -Be '8'
        $found['MaxTasks'].Source | Should -Be 'given'
        $found['LogLevel'].Source | Should -Be ''
    }

    It 'drops what the stack has for a parameter that the template has no more' {
        $inherited = [pscustomobject]@{ Source = 'the stack'; Value = @{ VpcId = 'vpc-1'; MaxFailedAuthenticationsPerIp = '30' } }
        $ParameterOverride = @{}
        $found = Resolve-Parameter -Template $template -MainOutput @{} -Inherited $inherited
        $found.Keys | Should -Not -Contain 'MaxFailedAuthenticationsPerIp'
        $found['VpcId'].Source | Should -Be 'the stack'
    }

    It 'types arguments so that they can be pasted' {
        ConvertTo-Argument -Value @{ B = "it's"; A = 1; C = @('x', 'y') } | Should -Be "@{ A = '1'; B = 'it''s'; C = 'x', 'y' }"
    }
}

Describe 'The image''s tag' {
    BeforeEach {
        Clear-FakeProgram
        $root = (Resolve-Path -Path (Join-Path -Path $PSScriptRoot -ChildPath '../..')).Path
    }

    It 'is the git revision and the processor' {
        Add-FakeAnswer -Like 'git * rev-parse*' -Text '3f2a9c1b7d10'
        Add-FakeAnswer -Like 'git * status*' -Text @()
        Get-ImageTag -Root $root -Architecture 'amd64' | Should -Be '3f2a9c1b7d10-amd64'
    }

    It 'holds the content, too, when that is not the revision''s' {
        Add-FakeAnswer -Like 'git * rev-parse*' -Text '3f2a9c1b7d10'
        Add-FakeAnswer -Like 'git * status*' -Text ' M server.py'
        Get-ImageTag -Root $root -Architecture 'arm64' | Should -Match '^3f2a9c1b7d10-dirty-[0-9a-f]{12}-arm64$'
    }

    It 'is the content alone outside of git' {
        Add-FakeAnswer -Like 'git *' -Text 'not a git repository' -ExitCode 128
        Get-ImageTag -Root $root -Architecture 'amd64' | Should -Match '^content-[0-9a-f]{12}-amd64$'
    }

    It 'finds the one that was built anew last' {
        Add-FakeAnswer -Like 'aws ecr describe-images*' -Text '[{"Digest":"new","Tags":["r-amd64-rebuilt-2"],"At":3},{"Digest":"old","Tags":["deployed-r-amd64","r-amd64"],"At":1},{"Digest":"other","Tags":["r-arm64"],"At":4},{"Digest":"none","Tags":null,"At":5}]'
        (Get-Image -RepositoryUri 'registry/repository' -Tag 'r-amd64').Digest | Should -Be 'new'
    }
}
