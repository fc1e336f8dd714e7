"""Planning: pure arithmetic from an offer and a job to the lines of its bill, and the ranking of bills."""
