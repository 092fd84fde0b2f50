// Package governor decides when overload lowers rules of a policy, and when they are back. It is a control law, without clocks, files or
// goroutines: package steer measures, asks it, and acts.
//
// Every tick it is given how full each bounded resource is, how much passes through it and how much could. A resource presses where it is
// fuller than its high mark, has refused rows since, or a budget is exceeded. Then a rule goes one rung down its ladder: of those of the
// lowest priority the one that costs most; rules that cost nothing just now go down to the end before any of a higher priority goes at all. Where it would be full before that has an effect, rungs are taken until the rest is less than what
// can pass. After that it waits until the steps can have had an effect.
//
// Where nothing presses, and all resources have been below their low marks for a while, rules come back in the opposite order, as many rungs
// at once as the resources have room for: what passes now and what the rung adds, within a margin of what could pass. What could pass is known
// while something passes; where nothing does, one rung is tried.
//
// A rung that pressed again soon after it came back is held back, twice as long each time up to a bound, unless a resource has since been
// seen to take clearly more than then. So a constant overload is probed ever more rarely, and a disk that recovers is noticed at once.
package governor
