package changes

const (
	sysFstatat = 79
	sysStatx   = 291
)
