"""Programs that write what is generated: tables and figures of the pages, the gallery, digests of known code."""
