"""The course as a site that needs no kernel and no network: pages from committed notebooks (build, render)."""
