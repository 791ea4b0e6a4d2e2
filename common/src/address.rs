//! Who may have an address that a key derives. No IO, no clock.

pub mod claim;
pub mod reserved;
