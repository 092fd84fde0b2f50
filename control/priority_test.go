package control

import (
	"os"
	"strconv"
	"syscall"
	"testing"
)

// Threads that are there, and those that come after them.
func TestThreadsGiveWay(t *testing.T) {
	New(Options{})
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Skip(err)
	}
	for _, task := range tasks {
		id, _ := strconv.Atoi(task.Name())
		if now, err := syscall.Getpriority(syscall.PRIO_PROCESS, id); err == nil && 20-now < niceness {
			t.Errorf("thread %d has a niceness of %d: %d is wanted", id, 20-now, niceness)
		}
	}
}
