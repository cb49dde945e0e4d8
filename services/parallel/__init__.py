"""One model on many ranks: degrees, mesh, collectives, and how linears, sequences and blocks are split."""
