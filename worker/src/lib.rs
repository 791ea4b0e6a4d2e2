//! x
pub mod setup;
