"""The generated stubs of package `yuan.v1`. Do not edit: `make proto` writes them."""
