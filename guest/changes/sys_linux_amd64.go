package changes

const (
	sysFstatat = 262
	sysStatx   = 332

	sysPerfEventOpen = 298
)
