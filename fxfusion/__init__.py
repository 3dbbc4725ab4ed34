"""fxfusion: fuse independently trained networks with optimal transport, for any traceable model."""
