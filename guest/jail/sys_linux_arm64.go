package jail

const sysSetns = 268
