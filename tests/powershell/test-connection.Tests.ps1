# Pester 5. Run by tests/test_powershell.py, or by hand: Invoke-Pester -Path tests/powershell
BeforeAll {
    . (Join-Path -Path $PSScriptRoot -ChildPath 'FakePrograms.ps1')
    . (Join-Path -Path $PSScriptRoot -ChildPath '../../test-connection.ps1')

    function ConvertTo-StackJson {
        param([hashtable]$Outputs, [hashtable]$Parameters, [string]$Status = 'UPDATE_COMPLETE')
        $stack = @{ Id = 'arn:stack'; Name = 'agenticai-websocket-stack'; Status = $Status; Reason = $null }
        $stack['Outputs'] = @($Outputs.Keys | ForEach-Object { , @($_, $Outputs[$_]) })
        $stack['Parameters'] = @($Parameters.Keys | ForEach-Object { , @($_, $Parameters[$_]) })
        ConvertTo-Json -Depth 6 -InputObject $stack
    }

    $outputs = @{
        WebSocketEndpoint    = 'ws://gateway.example.com'
        ECSClusterName       = 'agenticai-cluster-prod'
        WebSocketServiceName = 'agenticai-websocket-prod'
        TargetGroupArn       = 'arn:target-group'
    }
    $parameters = @{ Environment = 'prod'; AllowedOrigins = 'https://a.example, https://b.example'; AuthJwksUrl = '' }
    $healthyService = '[{"Desired":2,"Running":2,"Pending":0,"Deployments":["PRIMARY"],"Rollout":["COMPLETED"],"Events":["steady"]}]'
    $TimeoutSeconds = 20
}

AfterAll {
    Remove-FakeProgram
}

Describe 'Invoke-Native' {
    BeforeEach { Clear-FakeProgram }

    It 'keeps output and error output apart and does not throw' {
        Add-FakeAnswer -Like 'aws broken*' -Text 'no such thing' -ExitCode 254
        $result = Invoke-Native -Command 'aws' -ArgumentList 'broken', 'thing'
        $result.ExitCode | Should -Be 254
        $result.Output.Count | Should -Be 0
        $result.ErrorOutput | Should -Be 'no such thing'
    }

    It 'returns the lines of a real program and its exit code' {
        $pwsh = (Get-Process -Id $PID).Path
        $code = '[Console]::Out.WriteLine(1); [Console]::Error.WriteLine(2); exit 3'
        $result = Invoke-Native -Command $pwsh -ArgumentList '-NoProfile', '-Command', $code
        $result.ExitCode | Should -Be 3
        $result.Output | Should -Be '1'
        $result.ErrorOutput | Should -Be '2'
    }
}

Describe 'Invoke-AwsCli' {
    BeforeEach { Clear-FakeProgram }

    It 'returns the answer as objects' {
        Add-FakeAnswer -Like 'aws sts*' -Text '{"Account": "123456789012"}'
        (Invoke-AwsCli -ArgumentList 'sts', 'get-caller-identity').Account | Should -Be '123456789012'
    }

    It 'throws with what AWS said' {
        Add-FakeAnswer -Like 'aws sts*' -Text 'ExpiredToken' -ExitCode 255
        { Invoke-AwsCli -ArgumentList 'sts', 'get-caller-identity' } | Should -Throw '*sts get-caller-identity*255*ExpiredToken*'
    }

    It 'returns nothing for an error that stands for absence' {
        Add-FakeAnswer -Like 'aws *' -Text 'Stack with id x does not exist' -ExitCode 255
        Get-Stack -Name 'x' | Should -BeNullOrEmpty
    }
}

Describe 'Set-ProcessEnvironment' {
    It 'is undone by what it returned, also where there was nothing' {
        $env:TEST_PUSHED = 'before'
        $before = Set-ProcessEnvironment -Value @{ TEST_PUSHED = 'now'; TEST_PUSHED_NEW = 'now' }
        $env:TEST_PUSHED | Should -Be 'now'
        $null = Set-ProcessEnvironment -Value $before
        $env:TEST_PUSHED | Should -Be 'before'
        Test-Path -Path 'Env:TEST_PUSHED_NEW' | Should -BeFalse
        Remove-Item -Path 'Env:TEST_PUSHED'
    }
}

Describe 'Assert-Tool' {
    It 'names every missing program and how to get it' {
        { Assert-Tool -Advice @{ 'no-such-tool-a' = 'Get A.'; 'no-such-tool-b' = 'Get B.' } } |
            Should -Throw '*no-such-tool-a, no-such-tool-b*Get A.*Get B.*'
    }
}

Describe 'Get-CheckTarget' {
    BeforeEach { Clear-FakeProgram }

    It 'reads the stack' {
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*' -Text (ConvertTo-StackJson -Outputs $outputs -Parameters $parameters)
        $target = Get-CheckTarget
        $target['Address'] | Should -Be 'ws://gateway.example.com'
        $target['LogGroupName'] | Should -Be '/ecs/agenticai-websocket-prod'
        $target['RequestOrigin'] | Should -Be 'https://a.example'
        $target['AuthenticationOn'] | Should -BeFalse
    }

    It 'names every output that is missing' {
        Add-FakeAnswer -Like 'aws *' -Text (ConvertTo-StackJson -Outputs @{ ECSClusterName = 'c' } -Parameters $parameters)
        { Get-CheckTarget } | Should -Throw '*WebSocketEndpoint, TargetGroupArn*'
    }

    It 'says what to do when there is no stack' {
        Add-FakeAnswer -Like 'aws *' -Text 'does not exist' -ExitCode 255
        { Get-CheckTarget } | Should -Throw '*does not exist*deploy-ecs.ps1*'
    }
}

Describe 'Test-Health' {
    It 'passes for 200 and ok' {
        Mock -CommandName Invoke-WebRequest -MockWith { [pscustomobject]@{ StatusCode = 200; Content = '{"status":"ok"}' } }
        (Test-Health -Address 'ws://x').Passed | Should -BeTrue
    }

    It 'fails while the server is starting' {
        Mock -CommandName Invoke-WebRequest -MockWith { throw 'Response status code does not indicate success: 503' }
        $result = Test-Health -Address 'ws://x'
        $result.Passed | Should -BeFalse
        $result.Detail | Should -BeLike '*503*'
        $result.NextStep | Should -Not -BeNullOrEmpty
    }

    It 'asks the host and scheme of the endpoint' {
        Mock -CommandName Invoke-WebRequest -MockWith { throw "asked $Uri" }
        (Test-Health -Address 'ws://a.example:8080/ws?x=1').Detail | Should -BeLike '*asked http://a.example:8080/health*'
        (Test-Health -Address 'wss://a.example').Detail | Should -BeLike '*asked https://a.example/health*'
    }
}

Describe 'Test-EcsService' {
    BeforeEach { Clear-FakeProgram }

    It 'passes when all tasks run and the rollout is complete' {
        Add-FakeAnswer -Like 'aws ecs describe-services*' -Text $healthyService
        (Test-EcsService -ClusterName 'c' -ServiceName 's').Passed | Should -BeTrue
    }

    It 'fails for <Name>' -TestCases @(
        @{ Name = 'a task too few'; From = '"Running":2'; To = '"Running":1' }
        @{ Name = 'a rollout under way'; From = 'COMPLETED'; To = 'IN_PROGRESS' }
        @{ Name = 'two deployments'; From = '["PRIMARY"]'; To = '["PRIMARY","ACTIVE"]' }
    ) {
        Add-FakeAnswer -Like 'aws ecs describe-services*' -Text ($healthyService.Replace($From, $To))
        (Test-EcsService -ClusterName 'c' -ServiceName 's').Passed | Should -BeFalse
    }

    It 'fails before the first image was deployed' {
        Add-FakeAnswer -Like 'aws ecs describe-services*' -Text '[]'
        (Test-EcsService -ClusterName 'c' -ServiceName 's').Detail | Should -BeLike '*no service yet*'
    }
}

Describe 'Test-Target' {
    BeforeEach { Clear-FakeProgram }

    It 'passes when every target is healthy, leaving draining ones out' {
        Add-FakeAnswer -Like 'aws elbv2*' -Text '[{"Id":"a","State":"healthy","Why":null},{"Id":"b","State":"draining","Why":null}]'
        (Test-Target -TargetGroupArn 'arn').Passed | Should -BeTrue
    }

    It 'fails for an unhealthy target and names it' {
        Add-FakeAnswer -Like 'aws elbv2*' -Text '[{"Id":"10.0.0.7","State":"unhealthy","Why":"503"}]'
        $result = Test-Target -TargetGroupArn 'arn'
        $result.Passed | Should -BeFalse
        $result.Detail | Should -BeLike '*10.0.0.7 is unhealthy (503)*'
    }

    It 'fails when there is no target' {
        Add-FakeAnswer -Like 'aws elbv2*' -Text '[]'
        (Test-Target -TargetGroupArn 'arn').Passed | Should -BeFalse
    }
}

Describe 'Test-Log' {
    BeforeEach { Clear-FakeProgram }

    It 'counts lines and errors' {
        $lines = '["{\"level\":\"INFO\"}","{\"level\":\"ERROR\"}"]'
        Add-FakeAnswer -Like 'aws logs filter-log-events*' -Text $lines
        $result = Test-Log -LogGroupName '/ecs/x'
        $result.Passed | Should -BeTrue
        $result.Detail | Should -Be '2 lines in the last 10 minutes, 1 of them errors'
    }

    It 'fails when the service is silent' {
        Add-FakeAnswer -Like 'aws logs filter-log-events*' -Text '[]'
        (Test-Log -LogGroupName '/ecs/x').Passed | Should -BeFalse
    }
}

Describe 'Test-WebSocket' {
    It 'makes the round trip, over messages of several frames and other types' -Skip:(-not $env:TEST_GATEWAY) {
        $result = Test-WebSocket -Address $env:TEST_GATEWAY -RequestOrigin 'https://a.example' -AuthenticationOn $false
        $result.Detail | Should -BeLike '*answered a ping in * ms'
        $result.Passed | Should -BeTrue
    }

    It 'reports the close code of a server that closes' -Skip:(-not $env:TEST_GATEWAY) {
        $result = Test-WebSocket -Address "$env:TEST_GATEWAY/closed" -AuthenticationOn $false
        $result.Passed | Should -BeFalse
        $result.Detail | Should -BeLike '*4401*'
    }

    It 'takes the refusal for a pass when a token is wanted and none was given' -Skip:(-not $env:TEST_GATEWAY) {
        $result = Test-WebSocket -Address "$env:TEST_GATEWAY/closed" -AuthenticationOn $true
        $result.Passed | Should -BeTrue
    }

    It 'fails where nobody listens' {
        $result = Test-WebSocket -Address 'ws://127.0.0.1:1' -AuthenticationOn $false
        $result.Passed | Should -BeFalse
        $result.NextStep | Should -Not -BeNullOrEmpty
    }
}

Describe 'Invoke-ConnectionTest' {
    BeforeEach {
        Clear-FakeProgram
        Add-FakeAnswer -Like 'aws sts get-caller-identity*' -Text '{"Account":"123456789012"}'
        Add-FakeAnswer -Like 'aws cloudformation describe-stacks*' -Text (ConvertTo-StackJson -Outputs $outputs -Parameters $parameters)
        Mock -CommandName Start-Sleep
    }

    It 'returns one object a check, in order' {
        Add-FakeAnswer -Like 'aws ecs describe-services*' -Text $healthyService
        Add-FakeAnswer -Like 'aws elbv2*' -Text 'AccessDenied' -ExitCode 255
        $Check = 'Service', 'Targets'
        $results = @(Invoke-ConnectionTest)
        $results.Check | Should -Be 'Service', 'Targets'
        $results.Passed | Should -Be $true, $false
        $results[1].Detail | Should -BeLike '*AccessDenied*'
    }

    It 'repeats a check that fails until it passes' {
        Add-FakeAnswer -Like 'aws ecs describe-services*' -Text ($healthyService.Replace('"Running":2', '"Running":0')), $healthyService
        $Check = @('Service')
        $WaitSeconds = 60
        $results = @(Invoke-ConnectionTest)
        $results[0].Passed | Should -BeTrue
        Should -Invoke -CommandName Start-Sleep -Times 1 -Exactly
    }
}
