package modules

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

func described(t *testing.T) string {
	t.Helper()
	folder := t.TempDir()
	for name, content := range map[string]string{
		"modules.dep":   "bridge: stp llc\nstp: llc\nllc:\nnft_chain_nat: nf_tables\nnf_tables:\nfuse:\n",
		"modules.alias": "alias rtnl-link-bridge bridge\nalias nft-chain-2-nat nft_chain_nat\nalias nft-chain-*-filter nf_tables\nalias char-major-10-229 fuse\nalias devname:fuse fuse\n",
	} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}

func TestAModuleIsFoundByWhatItIsFor(t *testing.T) {
	folder := described(t)
	for name, wanted := range map[string][]string{
		"rtnl-link-bridge": {"bridge"}, "nft-chain-2-nat": {"nft_chain_nat"}, "nft_chain_2_nat": {"nft_chain_nat"},
		"nft-chain-7-filter": {"nf_tables"}, "char-major-10-229": {"fuse"}, "devname:fuse": {"fuse"}, "nope": nil, "": nil, "[": nil,
	} {
		if found, err := aliases(folder, name); err != nil || !reflect.DeepEqual(found, wanted) {
			t.Errorf("%q: %v %v", name, found, err)
		}
	}
}

func TestWhatAModuleNeedsIsKnown(t *testing.T) {
	needs, err := dependencies(described(t))
	if err != nil || !reflect.DeepEqual(needs["bridge"], []string{"stp", "llc"}) || len(needs["fuse"]) != 0 || len(needs) != 6 {
		t.Error(needs, err)
	}
}

func TestWhatIsNotOfferedIsSaid(t *testing.T) {
	folder := described(t)
	for _, arguments := range [][]string{{"-q", "--", "nope"}, {}, {"-q"}, {"nope"}} {
		if Main(folder, arguments) == 0 {
			t.Error(arguments)
		}
	}
	// The one that it needs most has no file here: nothing is tried after that.
	if err := Load(folder, "bridge"); !os.IsNotExist(err) {
		t.Error(err)
	}
}
