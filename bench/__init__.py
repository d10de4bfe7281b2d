"""The harness: trains, measures and compares couplers. Data flows one way: config → data → record."""
