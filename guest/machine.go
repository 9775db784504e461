package main

import (
	"innkeeper/guest/boot"
	"innkeeper/guest/changes"
	"innkeeper/guest/freeze"
	"innkeeper/guest/volumes"
)

// inMachine gives the agent what only a microVM's guest has: the host cannot see its files or hold its disk still, and its end is the machine's.
func (a *agent) inMachine(guest *boot.Guest) {
	scans := changes.NewVerb(a.children, changes.Place{Upper: guest.Upper, Lowers: guest.Lowers, Private: guest.Private}, boot.Binary)
	a.table.AlsoOwn(scans.Pid)
	a.table.TellWrites(scans.Writes)
	a.verbs["changes"] = scans.Changes
	a.verbs["freeze_fs"] = freeze.New(guest.Disk, volumes.MountpointOf).Freeze
	a.serveVolumes(volumes.Mounted)
	a.end = boot.PowerOff
}
