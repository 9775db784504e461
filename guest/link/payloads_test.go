package link

import "testing"

func TestReleasedMemoryIsUsedAgain(t *testing.T) {
	var pool payloads
	first := pool.take(100 << 10)
	pool.give(first)
	if second := pool.take(50 << 10); &second[0] != &first[0] || len(second) != 50<<10 {
		t.Error("new memory although there was some")
	}
	if third := pool.take(50 << 10); &third[0] == &first[0] {
		t.Error("the same memory twice")
	}
	pool.give(first[:1])
	if fourth := pool.take(200 << 10); len(fourth) != 200<<10 || &fourth[0] == &first[0] {
		t.Error("too small a buffer")
	}
}

func TestLittleIsKept(t *testing.T) {
	var pool payloads
	pool.give(make([]byte, 100))
	for count := 0; count < 3*keptPayloads; count++ {
		pool.give(make([]byte, MaxPayload))
	}
	if len(pool.kept) != keptPayloads {
		t.Error(len(pool.kept), "buffers are kept")
	}
}
