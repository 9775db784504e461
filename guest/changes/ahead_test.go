package changes

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// A listing that is fetched in several parts, with directories among its files that are fetched in parts themselves.
func TestLongListings(t *testing.T) {
	g := newGuest(t)
	const names = 2*maxAheadNames + 2*aheadNames + 77
	for n := 0; n < names; n++ {
		g.write(fmt.Sprintf("%04d", n), "x")
	}
	for _, directory := range []string{"0000d", "0400d", "0700d", "0999d"} {
		for n := 0; n < 3*aheadNames; n++ {
			g.write(filepath.Join(directory, fmt.Sprint(n)), "x")
		}
	}
	g.ask("baseline", "")
	if a := g.ask("changes", "nothing"); a.Total != 0 || a.Scanned != names+4*(3*aheadNames+1) {
		t.Fatalf("%+v", a)
	}
	for n := 0; n < names; n++ {
		name := fmt.Sprintf("%04d", n)
		switch n % 3 {
		case 0:
			g.write(name, "longer")
		case 1:
			os.Remove(filepath.Join(g.upper, name))
		}
	}
	g.write("0700d/5", "longer")
	g.write("0700e", "new")
	if a := g.ask("changes", "many"); a.Total != uint64(2*names/3+1+2) {
		t.Fatalf("%+v instead of %d", a, 2*names/3+1+2)
	}
	if a := g.ask("changes", "nothing more"); a.Total != 0 {
		t.Fatalf("%+v", a)
	}
	os.RemoveAll(g.upper)
	os.Mkdir(g.upper, 0o700)
	if a := g.ask("changes", "all"); a.Total != uint64(names-(names+1)/3+4*3*aheadNames+1) {
		t.Fatalf("%+v", a)
	}
}
