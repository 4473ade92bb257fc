"""What has to be measured on a running model before its artifact is finished."""
