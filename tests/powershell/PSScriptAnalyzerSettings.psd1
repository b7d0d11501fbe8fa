# Settings of PSScriptAnalyzer for deploy-ecs.ps1 and test-connection.ps1. By hand:
#   Invoke-ScriptAnalyzer -Path deploy-ecs.ps1 -Settings tests/powershell/PSScriptAnalyzerSettings.psd1
@{
    # Every rule that is on by default, but for those of the level Information: they want an
    # [OutputType()] on functions that say in their help what they return.
    Severity = @('Error', 'Warning')

    Rules    = @{
        # The scripts run on Windows PowerShell 5.1 and on PowerShell 7.
        PSUseCompatibleSyntax = @{
            Enable         = $true
            TargetVersions = @('5.1', '7.0')
        }
    }
}
