package control

import (
	"os"
	"strconv"
	"sync"
	"syscall"
)

// niceness of an engine. Where processors are short the model's own threads go first: those that launch its kernels, and those that serve its tokens.
const niceness = 5

var lower = sync.OnceFunc(func() {
	for changed := true; changed; { // threads inherit it from those that start them, who may not have had it yet
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil { // nothing depends on it
			return
		}
		changed = false
		for _, task := range tasks {
			id, err := strconv.Atoi(task.Name())
			if err != nil {
				continue
			}
			if now, err := syscall.Getpriority(syscall.PRIO_PROCESS, id); err == nil && 20-now < niceness { // the system call gives 20 less it
				changed = syscall.Setpriority(syscall.PRIO_PROCESS, id, niceness) == nil || changed
			}
		}
	}
})

// GiveWay has the threads of this process give way to others where processors are short, from now on. New does it.
func GiveWay() { lower() }
