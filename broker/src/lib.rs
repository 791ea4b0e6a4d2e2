//! stub
pub mod gateways;
