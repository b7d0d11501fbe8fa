# Functions in place of the programs aws, docker and git. PowerShell finds a function before a
# program of the same name, so that the scripts call these. Dot-source it in BeforeAll, call
# Clear-FakeProgram in BeforeEach, and say with Add-FakeAnswer what is answered to which command.

function Clear-FakeProgram {
    $global:FakeProgram = @{ Calls = @(); Answers = @() }
}

function Add-FakeAnswer {
    # Like: pattern of the command line. Text: answers one after the other, the last one for good;
    # an empty list for no output at all.
    param([string]$Like, [string[]]$Text = @('{}'), [int]$ExitCode = 0)
    $answer = @{ Like = $Like; Text = @($Text); ExitCode = $ExitCode; Used = 0 }
    # What was added last comes first, so that a test can overrule what is common to all.
    $global:FakeProgram.Answers = @($answer) + $global:FakeProgram.Answers
}

function Get-FakeCall {
    # The command lines that were called and match the pattern.
    param([string]$Like = '*')
    @($global:FakeProgram.Calls | Where-Object { $_ -like $Like })
}

function global:Invoke-FakeProgram {
    param([string]$Line)
    $global:FakeProgram.Calls += $Line
    $answer = @($global:FakeProgram.Answers | Where-Object { $Line -like $_.Like })[0]
    if (-not $answer) {
        $global:LASTEXITCODE = 99
        Write-Error -Message "the test has no answer to: $Line" -ErrorAction Continue
        return
    }
    $global:LASTEXITCODE = $answer.ExitCode
    if ($answer.Text.Count -eq 0) {
        return
    }
    $text = $answer.Text[[Math]::Min($answer.Used, $answer.Text.Count - 1)]
    $answer.Used += 1
    if ($answer.ExitCode -ne 0) {
        Write-Error -Message $text -ErrorAction Continue
        return
    }
    $text
}

function global:aws { Invoke-FakeProgram -Line ('aws ' + ($args -join ' ')) }

function global:docker { Invoke-FakeProgram -Line ('docker ' + ($args -join ' ')) }

function global:git { Invoke-FakeProgram -Line ('git ' + ($args -join ' ')) }

function Remove-FakeProgram {
    $names = 'aws', 'docker', 'git', 'Invoke-FakeProgram'
    $names | ForEach-Object { Remove-Item -Path "function:$_" -ErrorAction SilentlyContinue }
    Remove-Variable -Name 'FakeProgram' -Scope Global -ErrorAction SilentlyContinue
}
