package changes

const (
	sysFstatat = 79
	sysStatx   = 291

	sysPerfEventOpen = 241
)
