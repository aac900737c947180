"""One running machine of a member: gateway, engine, placement, dashboard, command line."""
