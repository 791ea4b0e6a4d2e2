//! What both programs do around their work: start and end, watch their tasks, log, read certificates.

pub mod log;
pub mod process;
pub mod services;
pub mod tls;
