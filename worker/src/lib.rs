//! x

pub mod kernel;
