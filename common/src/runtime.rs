//! What both programs do around their work: start and end, supervise their tasks, log, count, read certificates.
//!
//! [`services`] owns every task of a program; `run` of the broker and of the worker fills it.

pub mod log;
pub mod metrics;
pub mod process;
pub mod reload;
pub mod services;
pub mod tls;
