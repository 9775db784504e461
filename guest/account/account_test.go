package account

import "testing"

func TestLookup(t *testing.T) {
	for _, name := range []string{"", "root", "0"} {
		user, err := Lookup(name)
		if err != nil || user.UID != 0 || user.Name != "root" || user.Home != "/root" {
			t.Errorf("%q: %+v %v", name, user, err)
		}
	}
	if user, err := Lookup("54321"); err != nil || user.UID != 54321 || user.GID != 54321 || user.Home != "/" {
		t.Errorf("a number without an entry: %+v %v", user, err)
	}
	if user, err := Lookup("54321:77"); err != nil || user.UID != 54321 || user.GID != 77 || len(user.Groups) != 1 || user.Groups[0] != 77 {
		t.Errorf("a user with a group: %+v %v", user, err)
	}
	for _, name := range []string{"54321:", "nosuch", "-1", "99999999999", "root:x"} {
		if user, err := Lookup(name); err == nil {
			t.Errorf("%q: %+v", name, user)
		}
	}
}

func TestGroupID(t *testing.T) {
	if gid, err := GroupID("root"); err != nil || gid != 0 {
		t.Error(gid, err)
	}
	if gid, err := GroupID("#77"); err != nil || gid != 77 {
		t.Error(gid, err)
	}
	if _, err := GroupID("nosuch"); err == nil {
		t.Error("found")
	}
}

func TestAUserMayNameItsGroup(t *testing.T) {
	user, err := Lookup("1234:7")
	if err != nil || user.UID != 1234 || user.GID != 7 || len(user.Groups) != 1 || user.Home != "/" {
		t.Error(user, err)
	}
	if _, err := Lookup("root:nosuch"); err == nil {
		t.Error("found")
	}
}
