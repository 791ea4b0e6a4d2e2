//! A router's key at the broker, from its request to its answer: checked, published, and answered when a gateway has it.
//!
//! Tasks: one, that of [`publisher`]. A request is no task: it is a future of [`crate::http`], which calls [`service`].
//! Owners: [`in_flight`] has the state of every key between its request and its answer, behind the shared handle of
//! [`handle`]; [`rate_limit`] counts keys that are not known yet.
//!
//! Previous stop of a key: [`crate::http`], with the body that [`request`] reads. Next stop: [`crate::fleet`], which
//! selects its gateway and remembers it, and [`crate::bus`], which receives the gateways' reports about it. A request
//! that fails ends as a [`Rejection`].

pub mod handle;
pub mod in_flight;
mod metrics;
pub mod publisher;
pub mod rate_limit;
mod rejection;
pub mod request;
mod service;

pub use self::metrics::Metrics;
pub use self::rejection::Rejection;
pub use self::service::{Exchange, ExpectedAnswer};
