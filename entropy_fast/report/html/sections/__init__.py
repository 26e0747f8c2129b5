"""What a report shows of one result, a file for every section: from numbers to typed rows, without any markup."""
