"""What parallel work gains and costs."""
