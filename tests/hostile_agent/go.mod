module innkeeper/hostile

go 1.19
