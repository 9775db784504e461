module innkeeper/guest

go 1.19
