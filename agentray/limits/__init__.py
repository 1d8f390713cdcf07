"""What sessions and tenants may spend: ledgers, rates and prices."""
