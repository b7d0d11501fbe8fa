"""What an agent behind the gateway needs: one file, to be copied into a Lambda function."""
