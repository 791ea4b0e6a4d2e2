//! Third-party MQTT servers, and their peculiarities.

mod mosquitto;
mod nats;
mod rabbitmq;
