module tiny_shell

go 1.19
