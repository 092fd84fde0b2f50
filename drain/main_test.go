package drain_test

import (
	"testing"

	"dmi/internal/leaks"
)

func TestMain(m *testing.M) { leaks.Main(m) }
