package exec

// The retained output of one process, and of all together.
const (
	journalBytes = 1 << 20
	budgetBytes  = 8 << 20
	remembered   = 32
)

// journal holds the last output of a process. Offsets count every byte it ever wrote, on all its outputs.
type journal struct {
	chunks     []chunk
	start, end int64
}

type chunk struct {
	kind byte
	at   int64
	data []byte
}

func (j *journal) size() int64 { return j.end - j.start }

func (j *journal) append(kind byte, data []byte) {
	if last := len(j.chunks) - 1; last >= 0 {
		// Small writes share a chunk, so that a chatty process does not cost a header for each.
		tail := &j.chunks[last]
		if tail.kind == kind && len(tail.data)+len(data) <= readBuffer {
			tail.data = append(tail.data, data...)
			j.end += int64(len(data))
			return
		}
	}
	j.chunks = append(j.chunks, chunk{kind, j.end, append([]byte(nil), data...)})
	j.end += int64(len(data))
}

// drop forgets the oldest count bytes.
func (j *journal) drop(count int64) {
	j.start += count
	if j.start > j.end {
		j.start = j.end
	}
	gone := 0
	for gone < len(j.chunks) && j.chunks[gone].at+int64(len(j.chunks[gone].data)) <= j.start {
		j.chunks[gone] = chunk{}
		gone++
	}
	j.chunks = j.chunks[gone:]
	if len(j.chunks) > 0 && j.chunks[0].at < j.start {
		first := &j.chunks[0]
		first.data = first.data[j.start-first.at:]
		first.at = j.start
	}
}

// at is the output from offset on, as far as it is in one piece. offset lies in start … end-1.
func (j *journal) at(offset int64) (kind byte, data []byte) {
	low, high := 0, len(j.chunks)-1
	for low < high {
		middle := (low + high + 1) / 2
		if j.chunks[middle].at <= offset {
			low = middle
		} else {
			high = middle - 1
		}
	}
	found := j.chunks[low]
	return found.kind, found.data[offset-found.at:]
}
