"""Plain-torch specification of every op: any float dtype, no cleverness. Also the fallback where no kernel runs."""
