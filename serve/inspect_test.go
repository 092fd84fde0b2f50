package serve

import "net/http"

// inspections asks every inspection, rightly and wrongly, of requests of the sample.
func (c *conformance) inspections(id, second, run, session string) {
	c.Helper()
	for _, path := range []string{
		"stats?request=" + id, "stats?run=" + run + "&per=request&site=resid_post&layer=0&tokens=1:3", "stats?session=" + session,
		"heads?run=" + run, "heads?request=" + id + "&site=pattern&layer=0&period=2&threshold=0.3",
		"tokens?run=" + run, "tokens?site=resid_post&layer=0&tokens=1:4&k=2&request=" + id,
		"outliers?run=" + run, "outliers?site=resid_post&layer=0&threshold=10&share=0.5&tolerance=0.1&session=" + session,
		"similarity?site=**.hook_resid_post&run=" + run, "similarity?site=resid_post&layer=0&tokens=1:4&sample=3&request=" + id,
		"compare?a=" + id + "&b=" + second, "compare?per=row&site=pattern&layer=0&tokens=0:2&tolerance=0.5&b=" + run + "&a=" + run,
	} {
		c.get("/v1/inspect/"+path, 200)
		answer, err := c.client.Head(c.base + "/v1/inspect/" + path)
		if err != nil {
			c.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			c.Errorf("HEAD %s: %s", path, answer.Status)
		}
	}
	for path, want := range map[string]int{
		"stats?run=none": 404, "stats?per=site": 400, "heads?request=none": 404, "heads?site=resid_post&request=" + id: 400,
		"tokens?request=none": 404, "tokens?tokens=x&request=" + id: 400, "outliers?run=none": 404, "outliers?site=pattern&run=" + run: 400, "router?run=" + run: 404, "router": 400,
		"similarity?request=none": 404, "similarity?site=pattern&run=" + run: 400, "similarity?sample=4096&site=**&run=" + run: 400, "compare?b=none&a=" + id: 404,
		"compare?b=" + run + "&a=" + id: 400, "compare?site=none&b=" + id + "&a=" + id: 404,
		"lens?request=" + id: 404, "lens": 400,
	} {
		c.get("/v1/inspect/"+path, want)
	}
	for _, path := range []string{"stats?per=row&request=" + id, "heads?threshold=2&request=" + id, "heads?period=0&request=" + id,
		"tokens?k=0&request=" + id, "outliers?share=2&request=" + id, "similarity?sample=1&request=" + id, "lens?k=0&request=" + id, "compare?a=" + id,
		"compare?per=site&tolerance=-1&b=" + id + "&a=" + id} {
		c.ask("GET", "/v1/inspect/"+path, nil, 400, false)
	}
}
