"""The reference operating system: masks, page tables, encryption of live memory."""
