package jail

const sysSetns = 308
