//! The common parts of both programs: start and end, supervision of tasks, logging, metrics, reports to the service
//! manager.
//!
//! Tasks: [`services`] owns every task of a program; `run` of the broker and of the worker fills it. Two of them are here:
//! [`reload`] and [`service_manager`]. Previous stop: `main` of a program; next stops: the log, Prometheus, systemd.

pub mod hangups;
pub mod heartbeat;
pub mod line_budget;
pub mod log;
pub mod logged_once;
pub mod metrics;
pub mod process;
pub mod reload;
pub mod service_manager;
pub mod services;
