//! The broker's two MQTT connections: what it publishes of itself, and what it hears from workers and other brokers.

pub mod announcer;
pub mod askers;
pub mod complaints;
mod metrics;
pub mod subscriber;

pub use self::metrics::Metrics;
