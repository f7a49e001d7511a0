"""What certifies a method or an adapter: tiny models of every architecture, a dense oracle, and the checks on them."""
